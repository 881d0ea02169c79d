"""The embedded demo: a tiny draft/middle/target family and the corpus it is made from.

The models were trained from scratch on the standard library's own source, so that the first
`pipespec` command needs no download. They show the machinery; they are not useful writers of code.
"""
