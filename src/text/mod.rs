//! Text to token ids and back, and chats to texts.

mod chat;
mod json;
mod lm;
mod marian;

pub use chat::{ChatTemplate, Message};
pub use lm::{LmStreaming, LmTokenizer};
pub use marian::{ReadFile, Streaming, Tokenizer, is_special};
