//! The tokenizer against transformers' MarianTokenizer (tests/goldens/tokenizer/make.py).
#![cfg(feature = "embedded-model")]

use std::path::{Path, PathBuf};

use qkv::Result;
use qkv::text::Tokenizer;
use serde_json::Value;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tatoeba-en-fra-zho");

fn read(name: &str) -> Result<Option<Vec<u8>>> {
    Ok(std::fs::read(Path::new(MODEL).join(name)).ok())
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(Path::new(MODEL), &read).unwrap()
}

#[test]
fn ids_and_texts_equal_those_of_transformers() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizer/goldens.json");
    let path = std::env::var_os("QKV_TOKENIZER_GOLDENS").map_or(own, PathBuf::from);
    let goldens: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(goldens.len() >= 50);
    let tokenizer = tokenizer();
    let mut wrong = Vec::new();
    for golden in &goldens {
        let text = golden["text"].as_str().unwrap();
        let want = ids(&golden["ids"]);
        let got = tokenizer.encode(text, None).unwrap();
        if got != want {
            let pieces = |ids: &[u32]| {
                ids.iter()
                    .map(|&id| tokenizer.piece(id))
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            wrong.push(format!(
                "{text:?}: {} instead of {}",
                pieces(&got),
                pieces(&want)
            ));
        }
        let decoded = tokenizer.decode(&want);
        if decoded != golden["decoded"].as_str().unwrap() {
            wrong.push(format!(
                "{text:?} decoded: {decoded:?} instead of {}",
                golden["decoded"]
            ));
        }
    }
    println!("{} sentences, {} differ", goldens.len(), wrong.len());
    assert!(
        wrong.is_empty(),
        "{}",
        wrong[..wrong.len().min(20)].join("\n")
    );
}

#[test]
fn a_streamed_text_is_the_decoded_text() {
    let tokenizer = tokenizer();
    for text in ["Où est la gare ?", "你好嗎？ hello", "a  b", ""] {
        let ids = tokenizer.encode(text, Some("fra")).unwrap();
        let mut streaming = tokenizer.streaming();
        let streamed: String = ids.iter().filter_map(|&id| streaming.push(id)).collect();
        assert_eq!(streamed, tokenizer.decode(&ids));
    }
}

#[test]
fn languages_have_their_tags_and_shorter_names() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.languages(), ["fra", "zho"]);
    for (name, tag) in [
        ("fra", ">>fra<<"),
        ("fr", ">>fra<<"),
        ("zho", ">>zho<<"),
        ("zh", ">>zho<<"),
    ] {
        let ids = tokenizer.encode("Hello.", Some(name)).unwrap();
        assert_eq!(tokenizer.piece(ids[0]), tag);
    }
    let error = tokenizer
        .encode("Hello.", Some("tlh"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("tlh") && error.contains("fra, zho"),
        "{error}"
    );
}

#[test]
fn damaged_files_are_named() {
    let damaged = |file: &'static str, change: &'static dyn Fn(Vec<u8>) -> Option<Vec<u8>>| {
        let read = move |name: &str| match read(name)? {
            Some(bytes) if name == file => Ok(change(bytes)),
            other => Ok(other),
        };
        Tokenizer::load(Path::new(MODEL), &read)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default()
    };
    let half = &|bytes: Vec<u8>| Some(bytes[..bytes.len() / 2].to_vec());
    assert!(damaged("source.spm", half).contains("source.spm"));
    assert!(damaged("vocab.json", half).contains("vocab.json"));
    assert!(damaged("vocab.json", &|_| None).contains("vocab.json"));
    assert!(damaged("source.spm", &|_| None).contains("tokenizer.json"));
    assert!(damaged("vocab.json", &|_| Some(b"{\"a\": 0, \"b\": 0}".to_vec())).contains("one id"));
    assert!(damaged("vocab.json", &|_| Some(b"{\"a\": 7}".to_vec())).contains("of 1 in all"));
    assert!(damaged("vocab.json", &|_| Some(b"{\"a\": 0}".to_vec())).contains("</s>"));
}

/// Accents that stand alone are composed grapheme by grapheme in the library, and by the longest match
/// in sentencepiece: the one hard sentence that comes out differently, with a map that composes.
const DIFFERS: [(&str, &str); 1] = [("bytes", "cafe\u{301} e\u{301}\u{301} \u{301}")];

/// The small tokenizers of tests/goldens/tokenizer/tiny, whose sentences are all of the hard kind.
#[test]
fn small_tokenizers_of_every_kind_equal_their_goldens() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizer/tiny");
    let goldens = std::fs::read(tiny.join("goldens.json")).unwrap();
    let goldens: Value = serde_json::from_slice(&goldens).unwrap();
    let (mut sentences, mut differ) = (0, Vec::new());
    for kind in ["words", "bytes", "json"] {
        let read = |name: &str| Ok(std::fs::read(tiny.join(kind).join(name)).ok());
        let tokenizer = Tokenizer::load(&tiny.join(kind), &read).unwrap();
        let language = tokenizer.languages().first().copied();
        for golden in goldens[kind].as_array().unwrap() {
            let text = golden["text"].as_str().unwrap();
            let written = golden.get("written").unwrap_or(&golden["ids"]);
            let decoded = tokenizer.decode(&ids(written));
            assert_eq!(
                decoded,
                golden["decoded"].as_str().unwrap(),
                "{kind} {text:?}"
            );
            if tokenizer.encode(text, language).unwrap() != ids(&golden["ids"]) {
                differ.push((kind, text));
            }
            sentences += 1;
        }
    }
    assert_eq!((sentences, differ), (144, DIFFERS.to_vec()));
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}
