//! `qkv generate`: what it refuses.

use super::{GOLDENS, qkv, refuses};

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
