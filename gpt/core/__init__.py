"""What every command needs: errors, files, params, the command line."""
