//! Any bytes as a GGUF file: its tokenizer and its chat template, where it has them, do their work or refuse.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use qkv::gguf::Header;
use qkv::text::{ChatTemplate, LmTokenizer, Message};

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::parse(Path::new("fuzz"), bytes) else {
        return;
    };
    if let Ok(tokenizer) = LmTokenizer::from_gguf(&header) {
        for text in ["", "ab <s>é\n\u{301}日👍 12x", "<end>"] {
            if let Ok(ids) = tokenizer.encode(text, true) {
                tokenizer.decode(&ids);
            }
        }
        tokenizer.decode(&[0, 1, 2, 3, 300, u32::MAX]);
    }
    if let Ok(Some(template)) = ChatTemplate::from_gguf(&header) {
        let content = "hi".to_string();
        let role = "user".to_string();
        let _ = template.render(&[Message { role, content }], true);
    }
});
