"""Who acts: scripted experts, random, a human, a server, or a language model on an inference engine. Part of atod.

Model libraries are imported only by the modules that need them.
"""
