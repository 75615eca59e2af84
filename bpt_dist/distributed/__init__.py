"""The processes of a job: mesh, rendezvous, failure detection, watchdog."""
