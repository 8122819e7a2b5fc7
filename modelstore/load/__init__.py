"""From a snapshot to a model on a device.

    blocks            threads or a process: blocks into memory, each compared with its checksum
    reader            the reading of one snapshot, and the memory that it fills
    reader_process    what reads for it: threads, or a process beside a worker
    transfer          blocks from the ring to the memory of devices
    device            GPUs by their driver, without torch
    torch_device      devices as torch has them
    tensors           the snapshot's tensors on a device (torch)
    model             a transformers model of these tensors, as `from_pretrained` would make it (torch, transformers)
    model_class       its class and its configs
    memory            whether a model fits
    views             tensors that are views of a file in memory
    weights_socket, model_folder    for a server on this host: the weights as they arrive, and the folder of a model
    vllm_plugin       the load format `modelstore` of vLLM

Other packages may import all of these. Nothing here imports `fill`.
"""
