"""What `stages.promote` and `stages.lineage` do: compare models, and trace files to their origins."""
