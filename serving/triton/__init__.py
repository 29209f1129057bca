"""The service inside Triton's Python backend. Only a process of Triton's imports `model` and `tasks`."""
