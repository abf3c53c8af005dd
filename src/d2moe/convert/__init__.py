"""From other formats into a d2moe container: read a checkpoint, quantise, write, resumable at every expert."""
