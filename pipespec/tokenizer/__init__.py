"""Text to token ids and back, and whether two models mean the same by an id.

Built on the `tokenizers` library; transformers is imported only to render a chat template and for
folders without a tokenizer.json.
"""

from pipespec.tokenizer.folder import Tokenizer, load_tokenizer
from pipespec.tokenizer.plain import ByteTokenizer
from pipespec.tokenizer.protocol import ChatMessages, TextTokenizer
from pipespec.tokenizer.stream import StreamDecoder, token_lengths
from pipespec.tokenizer.vocabulary import Vocabulary, check_same_tokenizer, first_difference

__all__ = [
    "ByteTokenizer",
    "ChatMessages",
    "StreamDecoder",
    "TextTokenizer",
    "Tokenizer",
    "Vocabulary",
    "check_same_tokenizer",
    "first_difference",
    "load_tokenizer",
    "token_lengths",
]
