//! Any bytes as a directory's tokenizer: behind an `s` as source.spm, else as tokenizer.json of either kind of model.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use qkv::text::{LmTokenizer, Tokenizer};

/// The vocabulary beside source.spm.
const VOCAB: &[u8] = br#"{"</s>": 0, "<unk>": 1, "a": 2, "\u2581a": 3, ">>fra<<": 4}"#;
const TEXT: &str = "a \u{e9} \u{ff46}\u{301} \u{65e5}\u{1f44d} \u{fdfa}\n12x</s>";

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    let read = |name: &str| {
        Ok(match (*kind, name) {
            (b's', "source.spm") => Some(bytes.to_vec()),
            (b's', "vocab.json") => Some(VOCAB.to_vec()),
            (b's', _) => None,
            (_, "tokenizer.json") => Some(bytes.to_vec()),
            _ => None,
        })
    };
    if let Ok(tokenizer) = Tokenizer::load(Path::new("fuzz"), &read) {
        if let Ok(ids) = tokenizer.encode(TEXT, Some("fra")).or(tokenizer.encode(TEXT, None)) {
            tokenizer.decode(&ids);
        }
    }
    if *kind != b's'
        && let Ok(tokenizer) = LmTokenizer::load(Path::new("fuzz"), &read)
        && let Ok(ids) = tokenizer.encode(TEXT, true)
    {
        tokenizer.decode(&ids);
    }
});
