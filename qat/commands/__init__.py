"""The commands of ``qat``, a file for each group: a command's arguments, its help and its action stand together."""
