"""The only package that imports MLflow. Client calls only, no active run.

The import takes more than a second: stages do it while their child runs (`stages.runs.publish.connect`).
"""
