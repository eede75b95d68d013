//! Ids and texts as transformers gives them, from GGUF files and from Hugging Face directories.

use qkv::gguf::{Gguf, Header};
use qkv::text::LmTokenizer;
use serde_json::Value;

use crate::goldens::{golden, json, smollm2};
use crate::writer::{File, array, text, value};

fn open(name: &str) -> LmTokenizer {
    let gguf = Gguf::open(&golden(name)).unwrap();
    LmTokenizer::from_gguf(gguf.header()).unwrap()
}

fn ids(case: &Value) -> Vec<u32> {
    let ids = case["ids"].as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Every text's ids, and what they are decoded to, at once and token by token. transformers leaves out what
/// a vocabulary has no bytes for; here such texts, as many as expected, are refused.
fn judge(name: &str, tokenizer: &LmTokenizer, lacking: usize) {
    let goldens = json(&format!("gguf/{name}-ids.json"));
    let whole = &goldens["whole"];
    let hello = tokenizer
        .encode(whole["text"].as_str().unwrap(), true)
        .unwrap();
    assert_eq!(hello, ids(whole), "{name}");
    let cases = goldens["cases"].as_array().unwrap();
    assert!(cases.len() > 300, "{name}");
    let mut refused = 0;
    for case in cases {
        let (text, want) = (case["text"].as_str().unwrap(), ids(case));
        match tokenizer.encode(text, false) {
            Ok(ids) => assert_eq!(ids, want, "{name}: {text:?}"),
            Err(said) => {
                assert!(
                    said.to_string().contains("no token for the byte 0x"),
                    "{said}"
                );
                refused += 1;
            }
        }
        let decoded = tokenizer.decode(&want);
        assert_eq!(
            decoded,
            case["decoded"].as_str().unwrap(),
            "{name}: {text:?}"
        );
        let mut streaming = tokenizer.streaming();
        let mut streamed = String::new();
        for &id in &want {
            streamed += &streaming.push(id);
        }
        // Texts are UTF-8, so nothing is held back at their end.
        assert_eq!(streaming.finish(), "", "{name}: {text:?}");
        assert_eq!(
            streamed,
            case["decoded"].as_str().unwrap(),
            "{name}: {text:?}"
        );
    }
    assert_eq!(refused, lacking, "{name}");
}

#[test]
fn ids_and_texts_are_those_of_transformers() {
    for name in ["qwen2", "llama-bpe", "tekken", "default", "spm"] {
        judge(name, &open(&format!("gguf/{name}.gguf")), 0);
    }
}

#[test]
fn a_hugging_face_directory_gives_the_same_ids() {
    for name in ["qwen2", "spm"] {
        let origin = golden("gguf").join(name);
        let read = |file: &str| Ok(std::fs::read(origin.join(file)).ok());
        let tokenizer = LmTokenizer::load(&origin, &read).unwrap();
        judge(name, &tokenizer, 0);
        let same = open(&format!("gguf/{name}.gguf"));
        assert_eq!(tokenizer.bos(), same.bos(), "{name}");
        // A GGUF file's are also those that are spelled like ends.
        let (ends, more): (&[u32], &[u32]) = match name {
            "qwen2" => (&[642], &[640, 642]),
            _ => (&[2], &[2]),
        };
        assert_eq!((tokenizer.ends(), same.ends()), (ends, more), "{name}");
        assert_eq!(tokenizer.len(), same.len(), "{name}");
    }
}

#[test]
fn a_template_of_tokens_that_are_not_there_is_refused() {
    let origin = golden("gguf").join("spm");
    let json = std::fs::read(origin.join("tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&json).unwrap();
    json["post_processor"]["special_tokens"] = serde_json::json!({});
    let read = |file: &str| match file {
        "tokenizer.json" => Ok(Some(json.to_string().into_bytes())),
        _ => Ok(std::fs::read(origin.join(file)).ok()),
    };
    let said = LmTokenizer::load(&origin, &read).err().expect("a refusal");
    let word = "tokenizer.json: its template's special token \"<s>\" is not there";
    assert!(said.to_string().contains(word), "{said}");
}

#[test]
fn the_real_model_has_the_ids_of_transformers() {
    let Some(path) = smollm2() else {
        return;
    };
    let gguf = Gguf::open(&path).unwrap();
    let tokenizer = LmTokenizer::from_gguf(gguf.header()).unwrap();
    judge("smollm2", &tokenizer, 0);
    assert_eq!(
        (tokenizer.len(), tokenizer.bos(), tokenizer.ends()),
        (49152, Some(1), &[0, 2][..])
    );
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(100));
    assert_eq!(tokenizer.token(2).as_deref(), Some("<|im_end|>"));
    assert_eq!(tokenizer.token(49152), None);
}

#[test]
fn characters_are_held_back_until_they_are_whole() {
    for name in ["default", "spm"] {
        let tokenizer = open(&format!("gguf/{name}.gguf"));
        // Not among what either was trained on: a token for each byte.
        let ids = tokenizer.encode("🏴", false).unwrap();
        let bytes = &ids[ids.len() - 4..];
        let mut streaming = tokenizer.streaming();
        let pushed: Vec<String> = bytes.iter().map(|&id| streaming.push(id)).collect();
        assert_eq!(pushed, ["", "", "", "🏴"], "{name}");

        // Cut off by the end, or by another character.
        let mut streaming = tokenizer.streaming();
        assert_eq!(streaming.push(bytes[0]) + &streaming.push(bytes[1]), "");
        assert_eq!(streaming.finish(), "\u{fffd}", "{name}");
        let a = *tokenizer.encode("xa", false).unwrap().last().unwrap();
        assert_eq!(
            tokenizer.decode(&[a, bytes[0], bytes[1], a, bytes[2], a]),
            "a\u{fffd}a\u{fffd}a"
        );
        // Ids that are none add nothing.
        assert_eq!(tokenizer.decode(&[a, 1 << 30, a]), "aa");
    }
}

/// A vocabulary of every byte's letter, some words, and control tokens.
fn small() -> File {
    let header = Gguf::open(&golden("gguf/default.gguf")).unwrap();
    let tokens = header
        .header()
        .texts("tokenizer.ggml.tokens")
        .unwrap()
        .unwrap();
    let bytes = tokens.iter().filter(|token| token.chars().count() == 1);
    let mut tokens: Vec<Vec<u8>> = bytes.map(|token| text(token)).collect();
    tokens.extend([text("ab"), text("<end>")]);
    let mut kinds = vec![1i32.to_le_bytes().to_vec(); tokens.len()];
    *kinds.last_mut().unwrap() = 3i32.to_le_bytes().to_vec();
    File::new()
        .with("tokenizer.ggml.model", value(8, &text("gpt2")))
        .with("tokenizer.ggml.pre", value(8, &text("default")))
        .with("tokenizer.ggml.tokens", array(8, &tokens))
        .with("tokenizer.ggml.token_type", array(5, &kinds))
        .with("tokenizer.ggml.merges", array(8, &[text("a b")]))
        .with(
            "tokenizer.ggml.eos_token_id",
            value(4, &257u32.to_le_bytes()),
        )
}

#[test]
fn bytes_without_a_token_are_refused_not_left_out() {
    let mut file = small();
    for (_, value) in &mut file.metadata {
        // The letter q becomes a word that no text has.
        let q = text("q");
        if let Some(at) = value.windows(q.len()).position(|bytes| bytes == q) {
            value[at + 8] = 0x7f;
        }
    }
    let header = Header::parse(std::path::Path::new("m.gguf"), &file.bytes()).unwrap();
    let tokenizer = LmTokenizer::from_gguf(&header).unwrap();
    assert_eq!(tokenizer.encode("ab", false).unwrap().len(), 1);
    let said = tokenizer.encode("aqua", false).unwrap_err().to_string();
    assert_eq!(
        said,
        "the text is \"aqua\": the vocabulary has no token for the byte 0x71"
    );
}

#[test]
fn ends_are_those_that_are_named_and_those_that_are_spelled_so() {
    let mut file = small();
    let header = |file: &File| Header::parse(std::path::Path::new("m.gguf"), &file.bytes());
    let own = LmTokenizer::from_gguf(&header(&file).unwrap()).unwrap();
    assert_eq!(own.ends(), [257]);
    // Three letters, by name.
    for (name, id) in [("eot", 10u32), ("eom", 20), ("fim_sep", 30)] {
        let key = format!("tokenizer.ggml.{name}_token_id");
        file = file.with(&key, value(4, &id.to_le_bytes()));
    }
    let list = |file: &File, key: &str| {
        let parsed = header(file).unwrap();
        let all = parsed.texts(key).unwrap().unwrap();
        all.iter().map(|token| text(token)).collect::<Vec<_>>()
    };
    let (tokens, kinds) = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type");
    let mut all = list(&file, tokens);
    let more = [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "</s>",
        "<end_of_turn>",
        "<|im_start|>",
        "<s>",
    ];
    all.extend(more.map(text));
    let n = all.len();
    // A normal one, one that the user defined, then control tokens.
    let kind = |ix: usize| match ix {
        257 => 3,
        258 => 1,
        259 => 4,
        ix if ix > 259 => 3,
        _ => 1i32,
    };
    let all_kinds: Vec<Vec<u8>> = (0..n).map(|ix| kind(ix).to_le_bytes().to_vec()).collect();
    file.metadata
        .retain(|(key, _)| key != tokens && key != kinds);
    file = file
        .with(tokens, array(8, &all))
        .with(kinds, array(5, &all_kinds));
    let tokenizer = LmTokenizer::from_gguf(&header(&file).unwrap()).unwrap();
    let wanted: Vec<u32> = [10, 20, 30].into_iter().chain(257..265).collect();
    assert_eq!(tokenizer.ends(), wanted);
    assert!(wanted.iter().all(|&id| tokenizer.is_special(id)));
    // None of them is cut.
    let ids = tokenizer.encode("ab<|im_end|></s>", false).unwrap();
    assert_eq!(ids[1..], [258, 263]);
    let ids = file.with(
        "tokenizer.ggml.fim_rep_token_id",
        value(4, &300u32.to_le_bytes()),
    );
    let said = LmTokenizer::from_gguf(&header(&ids).unwrap()).err();
    assert!(
        said.unwrap()
            .to_string()
            .contains("fim_rep_token_id is 300")
    );
}

#[test]
fn a_piece_of_a_book_is_refused() {
    // Every way to cut a million letters would be half a million million bytes.
    let file = |long: usize| {
        let tokens = ["<unk>", "a", &"a".repeat(long)].map(text);
        let scores = vec![0f32.to_le_bytes().to_vec(); 3];
        File::new()
            .with("tokenizer.ggml.model", value(8, &text("llama")))
            .with("tokenizer.ggml.tokens", array(8, &tokens))
            .with("tokenizer.ggml.scores", array(6, &scores))
            .with("tokenizer.ggml.add_bos_token", value(7, &[0]))
            .with(
                "tokenizer.ggml.unknown_token_id",
                value(4, &0u32.to_le_bytes()),
            )
    };
    let parse = |file: File| {
        let header = Header::parse(std::path::Path::new("m.gguf"), &file.bytes()).unwrap();
        LmTokenizer::from_gguf(&header).err().map(|e| e.to_string())
    };
    let started = std::time::Instant::now();
    assert_eq!(parse(file(1024)), None);
    for long in [1025, 1 << 20] {
        let said = parse(file(long)).unwrap();
        assert!(said.contains(&format!("a token of {long} bytes")), "{said}");
    }
    assert!(started.elapsed().as_secs() < 10);
}

#[test]
fn vocabularies_that_contradict_themselves_are_refused() {
    let parse = |file: &File| {
        let header = Header::parse(std::path::Path::new("m.gguf"), &file.bytes()).unwrap();
        LmTokenizer::from_gguf(&header)
    };
    let good = parse(&small()).unwrap();
    assert_eq!(good.encode("ab<end>", false).unwrap()[1..], [257]);
    let set = |key: &str, value: Vec<u8>| {
        let mut file = small();
        file.metadata.retain(|(other, _)| other != key);
        file.with(key, value)
    };
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let floats = |n: usize| array(6, &vec![0f32.to_le_bytes().to_vec(); n]);
    for (name, value, word) in [
        ("model", value(8, &text("bert")), "gpt2 and llama"),
        (
            "model",
            value(8, &text("llama")),
            "neither a token for every byte",
        ),
        ("model", value(4, &[0; 4]), "a text is wanted"),
        ("pre", value(8, &text("gpt-9")), "\"gpt-9\"; default"),
        (
            "tokens",
            array(8, &[text("a"), text("a")]),
            "\"a\" twice, at 0 and 1",
        ),
        ("tokens", array(8, &[text("a")]), "258 entries for 1 tokens"),
        ("token_type", floats(258), "list of integers"),
        ("merges", array(8, &[text("a")]), "\"a\", which are not two"),
        ("merges", array(8, &[text("a c")]), "\"a c\""),
        ("merges", array(8, &[text("a b c")]), "\"a b c\""),
        (
            "eos_token_id",
            value(4, &258u32.to_le_bytes()),
            "258, of 258",
        ),
        (
            "add_bos_token",
            value(7, &[1]),
            "no tokenizer.ggml.bos_token_id",
        ),
        ("add_space_prefix", value(7, &[1]), "false is wanted"),
    ] {
        let said = parse(&set(&key(name), value))
            .err()
            .expect(word)
            .to_string();
        assert!(
            said.contains(word) && said.starts_with("m.gguf: "),
            "{said}"
        );
    }
    let mut bare = small();
    bare.metadata
        .retain(|(key, _)| key != "tokenizer.ggml.tokens");
    assert!(
        parse(&bare)
            .err()
            .unwrap()
            .to_string()
            .contains("no tokenizer.ggml.tokens")
    );
}
