//! `qkv generate`: what it refuses.

use super::{GOLDENS, qkv, refuses, stdout};

#[test]
fn generation_that_cannot_be_done_is_refused_by_name() {
    let dir = format!("{GOLDENS}/causal/llama");
    for (arguments, names) in [
        (&["--model", &dir, " "][..], &["the prompt is empty"][..]),
        (&["hello"], &["--model is absent", "a GGUF file"]),
        (
            &["--model", &dir, "--temperature", "-1", "hello"],
            &["temperature is -1", "0.001 to 1000"],
        ),
        (
            &["--model", &dir, "--top-p", "0", "hello"],
            &["top_p is 0", "above 0"],
        ),
        (&["--model", "/nowhere", "hello"], &["/nowhere"]),
        (&["--model", &dir, "hello"], &["tokenizer.json"]),
        (
            &[
                "--model",
                concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"),
                "hello",
            ],
            &["README.md", "GGUF"],
        ),
    ] {
        refuses(&qkv(&[&["generate"], arguments].concat(), b""), names);
    }
    let file = std::env::temp_dir().join(format!("qkv-prompts-{}.txt", std::process::id()));
    let path = file.to_str().unwrap();
    for (text, arguments, names) in [
        (
            &b"a\n \nb\n"[..],
            &["--batch", path][..],
            &[path, "line 2", "the prompt is empty"][..],
        ),
        (b"", &["--batch", path], &["--batch is an empty file"]),
        (b"a\xff\n", &["--batch", path], &[path, "UTF-8"]),
        (b"a", &["--batch", "/nowhere"], &["/nowhere"]),
        (b"a", &["--batch", path, "b"], &["--batch", "[PROMPT]"]),
        (b"a", &[], &["<PROMPT>"]),
        (
            b"a",
            &["--batch", path, "--page-size", "0"],
            &["--page-size", "'0'", "1.."],
        ),
        (
            b"a",
            &["--batch", path, "--budget", "0"],
            &["--budget", "'0'", "1.."],
        ),
        (
            b"a",
            &["--batch", path, "--max-sequences", "0"],
            &["--max-sequences", "'0'", "1.."],
        ),
        (b"a", &["--budget", "9", "b"], &["--budget", "[PROMPT]"]),
        (
            b"a",
            &["--batch", path, "--draft", "ngram"],
            &["--draft", "--batch"],
        ),
        (b"a", &["--draft-tokens", "3", "b"], &["--draft"]),
        (
            b"a",
            &["--draft", "ngram", "--draft-tokens", "17", "b"],
            &["--draft-tokens", "17", "1..=16"],
        ),
        (
            b"a",
            &["--kv-cache", "q5_0", "b"],
            &["--kv-cache", "q5_0", "q4_0"],
        ),
        (
            b"a",
            &["--kv-cache", "f16,", "b"],
            &["--kv-cache", "f16,", "bf16"],
        ),
    ] {
        std::fs::write(&file, text).unwrap();
        let all = [&["generate", "--model", &dir], arguments].concat();
        refuses(&qkv(&all, b""), names);
    }
    std::fs::remove_file(&file).unwrap();
    let translate = [
        "translate",
        "--model",
        concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"),
        "--to",
        "fra",
        "hi",
    ];
    refuses(
        &qkv(&translate, b""),
        &["README.md", "one file", "a directory"],
    );
}

/// A model's directory with a tokenizer of letters, and these settings.
fn letters(generation: &serde_json::Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        let from = format!("{GOLDENS}/causal/llama/{name}");
        std::fs::copy(from, dir.path().join(name)).unwrap();
    }
    let letters = ('!'..='~').chain(['Ġ']).zip(0..);
    let vocab: serde_json::Map<_, _> = letters
        .map(|(letter, id)| (letter.to_string(), serde_json::Value::from(id)))
        .collect();
    let bytes = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": bytes,
        "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let write = |name: &str, json: &serde_json::Value| {
        std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    };
    write("tokenizer.json", &tokenizer);
    write("generation_config.json", generation);
    dir
}

#[test]
fn a_models_own_penalty_holds_where_none_is_given() {
    let dir = letters(&serde_json::json!({"repetition_penalty": 3.0, "temperature": 0.6}));
    let plain = letters(&serde_json::json!({}));
    let write = |dir: &tempfile::TempDir, more: &[&str]| {
        let model = dir.path().to_str().unwrap();
        let all = ["generate", "--model", model, "--json", "--max-tokens", "20"];
        let said = stdout(&qkv(&[&all[..], more, &["hello"]].concat(), b""));
        let json: serde_json::Value = serde_json::from_str(&said).unwrap();
        json["ids"].clone()
    };
    let own = write(&dir, &[]);
    assert_eq!(own, write(&plain, &["--repeat-penalty", "3"]));
    let free = write(&plain, &[]);
    assert_eq!(free, write(&dir, &["--repeat-penalty", "1"]));
    assert_ne!(own, free);
    let banned = letters(&serde_json::json!({"no_repeat_ngram_size": 2}));
    let model = banned.path().to_str().unwrap();
    refuses(
        &qkv(&["generate", "--model", model, "hello"], b""),
        &["no_repeat_ngram_size", "generation_config.json"],
    );
}
