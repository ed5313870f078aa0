"""The networks: generator, discriminator, face parser, their operators and checkpoints."""
