//! The program from outside: what it prints, and how it refuses.
#![cfg(all(feature = "cli", feature = "embedded-model"))]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

mod generate;

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens");

fn qkv(arguments: &[&str], input: &[u8]) -> Output {
    with_environment(arguments, input, &[])
}

fn with_environment(arguments: &[&str], input: &[u8], environment: &[(&str, &str)]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_qkv"))
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments does not read its input.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The program must refuse, in words that name all of `names`, with nothing on standard output.
#[track_caller]
fn refuses(output: &Output, names: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        output.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert!(!said.contains("panicked"), "{said}");
    for name in names {
        assert!(said.contains(name), "{name:?} is not in: {said}");
    }
}

#[test]
fn everyday_sentences_come_out_right() {
    let french = ["translate", "--to", "fra", "Who are you?"];
    assert_eq!(stdout(&qkv(&french, b"")), "Qui es-tu ?\n");
    let chinese = ["translate", "--to", "zh", "How are you?"];
    assert_eq!(stdout(&qkv(&chinese, b"")), "你好嗎？\n");
}

#[test]
fn a_pipe_gets_a_line_for_a_line_in_order_whatever_the_batch() {
    let input = "Who are you?\n\nI love you.\nWhere is the train station?\nThank you.\n".as_bytes();
    let one = stdout(&qkv(&["translate", "--to", "fra", "--batch", "1"], input));
    let all = stdout(&qkv(&["translate", "--to", "fra"], input));
    assert_eq!(one, all);
    let lines: Vec<&str> = all.split('\n').collect();
    assert_eq!(lines.len(), 6);
    assert_eq!((lines[0], lines[1], lines[5]), ("Qui es-tu ?", "", ""));
    let beams = stdout(&qkv(&["translate", "--to", "fra", "--beam", "4"], input));
    assert_eq!(beams.split('\n').count(), 6);
    assert_eq!(qkv(&["translate", "--to", "fra"], input).stderr, b"");
}

#[test]
fn explain_counts_the_steps_and_weighs_the_words() {
    let arguments = ["translate", "--to", "fra", "--explain", "Who are you?"];
    let text = stdout(&qkv(&arguments, b""));
    let json: Value =
        serde_json::from_str(&stdout(&qkv(&[&arguments[..], &["--json"]].concat(), b""))).unwrap();
    let steps = json["steps"].as_array().unwrap();
    assert_eq!(json["encoder_steps"], 1);
    assert_eq!(json["decoder_steps"], steps.len());
    assert_eq!(json["tokens"].as_array().unwrap().len(), steps.len());
    assert!(json["device_peak_bytes"].as_u64().unwrap() > 8_000_000);
    for (ix, step) in steps.iter().enumerate() {
        for (kind, most) in [("source", usize::MAX), ("written", ix + 1)] {
            let words = step[kind].as_array().unwrap();
            let sum: f64 = words
                .iter()
                .map(|word| word["weight"].as_f64().unwrap())
                .sum();
            assert!(
                (sum - 1.0).abs() < 1e-4 && words.len() <= most,
                "step {ix} {kind}: {sum}"
            );
        }
    }
    let says = format!(
        "1 encoder step over 6 tokens, {} decoder steps",
        steps.len()
    );
    assert!(
        text.starts_with("Qui es-tu ?\n") && text.contains(&says),
        "{text}"
    );
}

#[test]
fn the_attention_picture_is_a_png_and_nothing_is_left_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map.png");
    let (to, text) = (
        ["translate", "--to", "zho", "--attention"],
        "Where is the train station?",
    );
    stdout(&qkv(
        &[
            &to[..],
            &[path.to_str().unwrap(), "--layer", "1", "--head", "2", text],
        ]
        .concat(),
        b"",
    ));
    assert!(std::fs::read(&path).unwrap().starts_with(b"\x89PNG"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let nowhere = dir.path().join("no/such/map.png");
    let said = qkv(&[&to[..], &[nowhere.to_str().unwrap(), text]].concat(), b"");
    refuses(&said, &["no/such/map.png"]);
    let path = path.to_str().unwrap();
    refuses(
        &qkv(&[&to[..], &[path, "--layer", "3", text]].concat(), b""),
        &["layer", "3", "0 to 2"],
    );
    refuses(
        &qkv(&[&to[..], &[path, "One.", "Two."]].concat(), b""),
        &["--attention", "one text"],
    );
}

#[test]
fn devices_are_listed_and_chosen() {
    let text = stdout(&qkv(&["devices"], b""));
    for name in [
        "driver",
        "f16",
        "subgroup size",
        "cooperative matrices",
        "chosen",
    ] {
        assert!(text.contains(name), "{text}");
    }
    let json = stdout(&qkv(&["devices", "--json"], b""));
    let first: Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    let name = first["name"].as_str().unwrap().to_string();
    for device in ["0", &name.to_uppercase()] {
        stdout(&qkv(
            &["--device", device, "translate", "--to", "fra", "Yes."],
            b"",
        ));
        stdout(&with_environment(
            &["translate", "--to", "fra", "Yes."],
            b"",
            &[("QKV_DEVICE", device)],
        ));
    }
    refuses(
        &qkv(
            &["translate", "--to", "fra", "--device", "Voodoo 2", "Yes."],
            b"",
        ),
        &["Voodoo 2", &name],
    );
    // A number is a number, also where it is part of a name.
    refuses(
        &qkv(&["devices", "--device", "256"], b""),
        &["--device", "256", &name],
    );
    let said = with_environment(&["devices"], b"", &[("QKV_DEVICE", "Voodoo 3")]);
    refuses(&said, &["QKV_DEVICE", "Voodoo 3"]);
}

#[test]
fn without_an_adapter_it_says_how_to_get_one() {
    let none = [
        ("VK_DRIVER_FILES", "/nowhere.json"),
        ("VK_ICD_FILENAMES", "/nowhere.json"),
    ];
    for arguments in [&["translate", "--to", "fra", "Yes."][..], &["devices"]] {
        refuses(
            &with_environment(arguments, b"", &none),
            &["no GPU adapter", "scripts/with-gpu", "mesa-vulkan-drivers"],
        );
    }
}

#[test]
fn bad_text_is_refused_before_anything_is_said() {
    let to = ["translate", "--to", "fra"];
    refuses(&qkv(&[&to[..], &[""]].concat(), b""), &["text 1", "empty"]);
    refuses(&qkv(&to, b" \n"), &["standard input", "empty"]);
    refuses(
        &qkv(&to, b"Yes.\nNo \xff\n"),
        &["not UTF-8", "byte 8", "line 2"],
    );
    let long = "word ".repeat(400);
    refuses(
        &qkv(&to, format!("Yes.\n{long}\n").as_bytes()),
        &["line 2", "tokens long", "256"],
    );
    refuses(
        &qkv(&["translate", "--to", "tlh", "Yes."], b""),
        &["tlh", "fra, zho"],
    );
    refuses(&qkv(&["translate", "Yes."], b""), &["--to", "fra, zho"]);
    refuses(
        &qkv(&[&to[..], &["--beam", "0", "Yes."]].concat(), b""),
        &["beams", "1 to 32"],
    );
    refuses(
        &qkv(
            &[&to[..], &["--max-tokens", "100000", "Yes."]].concat(),
            b"",
        ),
        &["max_tokens", "256"],
    );
    refuses(
        &qkv(&[&to[..], &["--layer", "1", "Yes."]].concat(), b""),
        &["--layer", "--explain"],
    );
    refuses(
        &qkv(&[&to[..], &["--no-such-option"]].concat(), b""),
        &["--no-such-option"],
    );
    refuses(
        &qkv(&[&to[..], &["--batch", "0", "Yes."]].concat(), b""),
        &["--batch"],
    );
}

/// A copy of the golden model `relu` whose files a test damages.
struct Damaged(tempfile::TempDir);

impl Damaged {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            std::fs::copy(
                Path::new(GOLDENS).join("relu").join(name),
                dir.path().join(name),
            )
            .unwrap();
        }
        Damaged(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self, key: &str, value: Value) {
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(self.path("config.json")).unwrap()).unwrap();
        json[key] = value;
        std::fs::write(self.path("config.json"), json.to_string()).unwrap();
    }

    fn weights(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.path("model.safetensors")).unwrap();
        change(&mut bytes);
        std::fs::write(self.path("model.safetensors"), bytes).unwrap();
    }

    /// `qkv forward` with this model must refuse and write nothing.
    #[track_caller]
    fn refused(&self, names: &[&str]) {
        let out = self.path("out.safetensors");
        let input = format!("{GOLDENS}/relu/goldens.safetensors");
        let arguments = [
            "forward",
            "--model",
            self.0.path().to_str().unwrap(),
            &input,
            "-o",
            out.to_str().unwrap(),
        ];
        refuses(&qkv(&arguments, b""), names);
        assert!(!out.exists());
    }
}

#[test]
fn a_damaged_model_is_refused_by_file_and_reason() {
    let remove = |name: &str| {
        let model = Damaged::new();
        std::fs::remove_file(model.path(name)).unwrap();
        model
    };
    remove("config.json").refused(&["config.json", "lacks this file"]);
    remove("model.safetensors").refused(&["model.safetensors", "lacks this file"]);
    type Damage = fn(&mut Vec<u8>);
    let damages: [(Damage, &str); 5] = [
        (|bytes| bytes.truncate(bytes.len() - 5), "whole"),
        (|bytes| bytes.truncate(3), "whole"),
        (|bytes| bytes[0] = 0xff, "whole"),
        (|bytes| bytes.push(0), "model.safetensors"),
        (
            |bytes| {
                let n = bytes.len();
                bytes[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            },
            "NaN",
        ),
    ];
    for (damage, reason) in damages {
        let model = Damaged::new();
        model.weights(damage);
        model.refused(&["model.safetensors", reason]);
    }
    let cases: [(&str, Value, &[&str]); 11] = [
        ("model_type", "t5".into(), &["model_type", "t5", "marian"]),
        (
            "activation_function",
            "tanh".into(),
            &["activation_function", "tanh", "relu"],
        ),
        ("vocab_size", 98.into(), &["model.shared.weight", "98"]),
        ("encoder_layers", 3.into(), &["model.encoder.layers.2"]),
        (
            "decoder_layers",
            2.into(),
            &["model.decoder.layers.2", "config.json"],
        ),
        ("encoder_attention_heads", 5.into(), &["heads", "5", "36"]),
        ("encoder_attention_heads", 0.into(), &["heads", "0"]),
        ("decoder_ffn_dim", 7.into(), &["fc1", "7"]),
        ("d_model", "wide".into(), &["config.json", "wide"]),
        (
            "max_position_embeddings",
            4.into(),
            &["tokens long", "4 positions"],
        ),
        ("normalize_before", true.into(), &["normalize_before"]),
    ];
    for (key, value, names) in cases {
        let model = Damaged::new();
        model.config(key, value);
        model.refused(names);
    }
    let nowhere = [
        "translate",
        "--to",
        "fra",
        "--model",
        "/no/such/model",
        "Yes.",
    ];
    refuses(&qkv(&nowhere, b""), &["/no/such/model"]);
}

#[test]
fn forward_writes_what_transformers_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    for name in ["relu", "tanh-untied", "causal/llama3", "causal/qwen3"] {
        let (model, input) = (
            format!("{GOLDENS}/{name}"),
            format!("{GOLDENS}/{name}/goldens.safetensors"),
        );
        let arguments = [
            "forward",
            "--attentions",
            "--model",
            &model,
            &input,
            "-o",
            out.to_str().unwrap(),
        ];
        assert_eq!(stdout(&qkv(&arguments, b"")), "");
        let (got, want) = (std::fs::read(&out).unwrap(), std::fs::read(&input).unwrap());
        let (got, want) = (
            SafeTensors::deserialize(&got).unwrap(),
            SafeTensors::deserialize(&want).unwrap(),
        );
        let mut compared = 0;
        for (tensor, view) in got.tensors() {
            let golden = want.tensor(&tensor).unwrap();
            assert_eq!(
                (view.dtype(), view.shape()),
                (Dtype::F32, golden.shape()),
                "{tensor}"
            );
            let floats = |view: &TensorView| -> Vec<f32> {
                view.data()
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|&bytes| f32::from_le_bytes(bytes))
                    .collect()
            };
            let worst = floats(&view)
                .iter()
                .zip(floats(&golden))
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(
                worst <= if tensor == "logits" { 1e-3 } else { 1e-4 },
                "{name} {tensor}: {worst}"
            );
            compared += 1;
        }
        let layers = want
            .names()
            .iter()
            .filter(|name| name.contains("attentions."))
            .count();
        let states = usize::from(want.tensor("encoder_states").is_ok());
        assert!(layers > 0);
        assert_eq!(compared, 1 + states + layers);
    }
}

#[test]
fn a_model_of_the_other_kind_is_refused() {
    let model = format!("{GOLDENS}/causal/llama3");
    let arguments = ["translate", "--model", &model, "--to", "fra", "Hello"];
    refuses(&qkv(&arguments, b""), &[&model]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(path, r#"{"model_type": "gemma3"}"#).unwrap();
    let input = format!("{model}/goldens.safetensors");
    let out = dir.path().join("out");
    let model = dir.path().to_str().unwrap();
    let out = out.to_str().unwrap();
    let arguments = ["forward", "--model", model, &input, "-o", out];
    refuses(&qkv(&arguments, b""), &["model_type", "gemma3", "qwen3"]);
}

#[test]
fn forward_refuses_bad_inputs_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (
        dir.path().join("in.safetensors"),
        dir.path().join("out.safetensors"),
    );
    let model = format!("{GOLDENS}/relu");
    let integers = |values: &[i64]| -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    };
    let run = |ids: &[i64], mask: &[i64], targets: &[i64], names: &[&str]| {
        let (ids, mask, targets) = (integers(ids), integers(mask), integers(targets));
        let view = |bytes| TensorView::new(Dtype::I64, vec![1, bytes_len(bytes)], bytes).unwrap();
        let mut tensors = vec![
            ("input_ids", view(&ids)),
            ("decoder_input_ids", view(&targets)),
        ];
        if !mask.is_empty() {
            tensors.push(("attention_mask", view(&mask)));
        }
        safetensors::serialize_to_file(tensors, None, &input).unwrap();
        let arguments = [
            "forward",
            "--model",
            &model,
            input.to_str().unwrap(),
            "-o",
            out.to_str().unwrap(),
        ];
        refuses(&qkv(&arguments, b""), names);
        assert!(!out.exists());
    };
    run(
        &[1, 97, 0],
        &[],
        &[96],
        &["input_ids", "token 97", "97 tokens"],
    );
    run(&[1, -1, 0], &[], &[96], &["input_ids", "negative"]);
    run(&[1, 2, 0], &[1, 0, 1], &[96], &["attention_mask", "end"]);
    run(&[1, 2, 0], &[0, 0, 0], &[96], &["input_ids", "row 0"]);
    run(&[1, 2, 0], &[1, 1], &[96], &["attention_mask", "shape"]);
    run(
        &[1, 2, 0],
        &[],
        &[96, 97],
        &["decoder_input_ids", "token 97"],
    );
    std::fs::write(&input, b"not a tensor").unwrap();
    let arguments = [
        "forward",
        "--model",
        &model,
        input.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
    ];
    refuses(&qkv(&arguments, b""), &["in.safetensors", "safetensors"]);
    let good = format!("{model}/goldens.safetensors");
    refuses(
        &qkv(
            &[
                "forward",
                "--model",
                &model,
                &good,
                "-o",
                "/no/such/out.safetensors",
            ],
            b"",
        ),
        &["/no/such/out"],
    );
}

fn bytes_len(bytes: &[u8]) -> usize {
    bytes.len() / 8
}

#[test]
fn the_only_language_need_not_be_named() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        let from = format!("{GOLDENS}/relu/{name}");
        std::fs::copy(from, dir.path().join(name)).unwrap();
    }
    let write = |languages: &[&str]| {
        let tags = languages.iter().map(|code| format!(">>{code}<<"));
        let words = ["</s>", "<unk>", "a"].map(String::from);
        let vocab: serde_json::Map<_, _> = (words.into_iter().chain(tags).zip(0..))
            .map(|(word, id)| (word, Value::from(id)))
            .collect();
        let tokenizer = serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        });
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    };
    let model = dir.path().to_str().unwrap();
    let translate = |more: &[&str]| {
        let all = ["translate", "--model", model, "--json"];
        qkv(&[&all[..], more, &["a a"]].concat(), b"")
    };
    let tokens = |more: &[&str]| -> Value {
        let json: Value = serde_json::from_str(&stdout(&translate(more))).unwrap();
        json["source_tokens"].clone()
    };
    write(&["fra"]);
    assert_eq!(tokens(&[]), tokens(&["--to", "fra"]));
    assert!(tokens(&[]).to_string().contains(">>fra<<"));
    write(&["fra", "zho"]);
    refuses(&translate(&[]), &["--to is absent", "fra, zho"]);
    write(&[]);
    assert!(!tokens(&[]).to_string().contains(">>"));
}
