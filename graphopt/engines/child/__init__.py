"""What runs in the child process that builds an engine. The parent knows `requests` and `worker.describe_gpu` of it."""
