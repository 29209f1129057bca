"""SHELF: the verbs of the command line. Each is a file with a click command named `command`."""

GROUPS = {
    "Make": {
        "import": "Read another project's checkpoint as a delta.",
        "merge": "Fold a task into the frozen weights, exactly or not at all.",
        "combine": "Combine several tasks of one backbone into one, in the weights.",
        "export": "Build one engine for one or many tasks, check it, write a bundle.",
        "export-peft": "Write a task as a LoRA adapter of Hugging Face PEFT.",
        "add": "Add tasks to a bundle without a rebuild.",
        "check": "Hold a bundle to torch, claim by claim.",
    },
    "Use": {
        "predict": "Labels and scores of pictures or tensors.",
        "serve": "Answer over HTTP and gRPC (Open Inference Protocol v2).",
        "task": "Add, update, remove and list the tasks of a running server.",
        "load": "Load a running server: latency and throughput, step by step.",
        "bench": "Time a bundle against the bare backbone.",
        "cost": "Price a bench report: cost per million images, machines for a load.",
        "compare": "Hold one report of bench or load to another, and fail where it is slower.",
    },
    "Look": {
        "inspect": "Say what a delta or a bundle holds.",
        "triton": "Write a Triton model repository from a bundle.",
        "doctor": "Say what is installed, what really loads, what is missing.",
    },
}
