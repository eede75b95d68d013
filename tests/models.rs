//! Small MarianMT models against what Hugging Face transformers makes of them (tests/goldens).
#![cfg(feature = "models")]

#[path = "support/compare.rs"]
mod compare;
#[path = "support/device.rs"]
mod device;

use std::path::{Path, PathBuf};

use device::gpu;
use qkv::generate::{CausalWishes, EarlyStopping, Generator, Settings};
use qkv::gpu::{DType, Gpu};
use qkv::model::{Memory, Model, Padded, Source};
use safetensors::SafeTensors;

const MODELS: [&str; 5] = [
    "relu",
    "gelu-separate",
    "gelu-new-f16",
    "swish-bf16",
    "tanh-untied",
];

struct Golden {
    dir: PathBuf,
    bytes: Vec<u8>,
}

impl Golden {
    fn new(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/goldens")
            .join(name);
        let bytes = std::fs::read(dir.join("goldens.safetensors")).unwrap();
        Golden { dir, bytes }
    }

    fn floats(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let values = view
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b) as f64)
            .collect();
        (view.shape().to_vec(), values)
    }

    fn rows(&self, name: &str) -> Vec<Vec<u32>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let ids: Vec<u32> = view
            .data()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&b| i64::from_le_bytes(b) as u32)
            .collect();
        ids.chunks(view.shape()[1]).map(<[u32]>::to_vec).collect()
    }

    fn sources(&self) -> Padded {
        let ids = self.rows("input_ids");
        Padded {
            len: ids[0].len() as u32,
            ids: ids.concat(),
            lengths: self
                .rows("attention_mask")
                .iter()
                .map(|row| row.iter().sum())
                .collect(),
        }
    }

    fn targets(&self) -> Padded {
        Padded::new(&self.rows("decoder_input_ids"), 0)
    }

    fn model(&self, gpu: &Gpu, dtype: DType) -> Model {
        Model::load(
            gpu,
            &Source::Directory(self.dir.clone()),
            dtype,
            &mut |_, _| {},
        )
        .unwrap()
    }
}

fn worst(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let worst = got.iter().zip(want).map(|(&a, &b)| (a as f64 - b).abs());
    worst.fold(
        0.0,
        |a, b| if b.is_nan() { f64::INFINITY } else { a.max(b) },
    )
}

#[test]
fn logits_states_and_attentions_equal_transformers() {
    let gpu = gpu();
    for name in MODELS {
        let golden = Golden::new(name);
        let model = golden.model(gpu, DType::F32);
        let memory = model.encode(&golden.sources(), true).unwrap();
        let forward = model.forward(&memory, &golden.targets(), true).unwrap();
        let logits = worst(
            &gpu.read_floats(&forward.logits).unwrap(),
            &golden.floats("logits").1,
        );
        let states = worst(
            &gpu.read_floats(&memory.states).unwrap(),
            &golden.floats("encoder_states").1,
        );
        let mut attentions = 0f64;
        for (kind, tensors) in [
            ("encoder", &memory.attentions),
            ("decoder", &forward.decoder_attentions),
            ("cross", &forward.cross_attentions),
        ] {
            for (ix, tensor) in tensors.iter().enumerate() {
                let (shape, want) = golden.floats(&format!("{kind}_attentions.{ix}"));
                assert_eq!(
                    shape,
                    tensor
                        .shape()
                        .iter()
                        .map(|&n| n as usize)
                        .collect::<Vec<_>>()
                );
                attentions = attentions.max(worst(&gpu.read_floats(tensor).unwrap(), &want));
            }
        }
        println!("{name}: logits {logits:.1e}, states {states:.1e}, attentions {attentions:.1e}");
        assert!(
            logits <= 1e-3 && states <= 1e-4 && attentions <= 1e-4,
            "{name}"
        );
    }
}

fn settings(golden: &Golden, run: &str) -> Settings {
    let text = std::fs::read(golden.dir.join("generation.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let run = &json[run];
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        match value {
            serde_json::Value::Array(list) => {
                list.iter().map(|id| id.as_u64().unwrap() as u32).collect()
            }
            serde_json::Value::Null => Vec::new(),
            one => vec![one.as_u64().unwrap() as u32],
        }
    };
    let mut settings = Settings::load(&Source::Directory(golden.dir.clone())).unwrap();
    settings.beams = run["num_beams"].as_u64().unwrap() as u32;
    settings.max_tokens = run["max_length"].as_u64().unwrap() as u32 - 1;
    settings.length_penalty = run["length_penalty"].as_f64().unwrap() as f32;
    settings.early_stopping = match &run["early_stopping"] {
        serde_json::Value::Bool(true) => EarlyStopping::Yes,
        serde_json::Value::String(_) => EarlyStopping::Never,
        _ => EarlyStopping::No,
    };
    settings.eos = ids(&run["eos_token_id"]);
    settings.forced_eos = ids(&run["forced_eos_token_id"]).first().copied();
    settings.forced_bos = ids(&run["forced_bos_token_id"]).first().copied();
    settings.suppressed = ids(&run["suppress_tokens"]);
    settings.bad_words.clear();
    for word in run["bad_words_ids"].as_array().into_iter().flatten() {
        match ids(word).as_slice() {
            // transformers ignores an end token in this list.
            [id] if settings.eos.contains(id) => {}
            [id] => settings.suppressed.push(*id),
            word => settings.bad_words.push(word.to_vec()),
        }
    }
    settings.begin_suppressed = ids(&run["begin_suppress_tokens"]);
    settings
}

fn generate(model: &Model, memory: &Memory, settings: &Settings) -> Vec<Vec<u32>> {
    let mut generator = Generator::new(model, memory, settings).unwrap();
    for step in &mut generator {
        step.unwrap();
    }
    generator
        .sequences()
        .into_iter()
        .map(|sequence| sequence.tokens)
        .collect()
}

/// What transformers returned, without the start token and the padding behind the end token.
fn wanted(golden: &Golden, name: &str, settings: &Settings) -> Vec<Vec<u32>> {
    let rows = golden.rows(name);
    rows.into_iter()
        .map(|row| {
            let row = &row[1..];
            let end = row
                .iter()
                .position(|id| settings.eos.contains(id))
                .map_or(row.len(), |end| end + 1);
            row[..end].to_vec()
        })
        .collect()
}

#[test]
fn greedy_and_beam_search_write_the_tokens_of_transformers() {
    let gpu = gpu();
    for name in MODELS {
        let golden = Golden::new(name);
        let model = golden.model(gpu, DType::F32);
        let memory = model.encode(&golden.sources(), false).unwrap();
        for (run, ids) in [("greedy", "greedy_ids"), ("beam4", "beam4_ids")] {
            let settings = settings(&golden, run);
            let want = wanted(&golden, ids, &settings);
            assert_eq!(generate(&model, &memory, &settings), want, "{name} {run}");
            // Each source alone writes what it writes in the batch.
            let sources = golden.sources();
            let rows = sources
                .ids
                .chunks(sources.len as usize)
                .zip(&sources.lengths);
            for ((source, &length), want) in rows.zip(&want) {
                let alone = Padded::new(&[&source[..length as usize]], 0);
                let alone = model.encode(&alone, false).unwrap();
                assert_eq!(
                    generate(&model, &alone, &settings),
                    std::slice::from_ref(want),
                    "{name} {run} alone"
                );
            }
        }
    }
}

/// In f16 weights and activations are rounded; logits may be off by this part of the largest.
const F16_ERROR: f64 = 0.005;

#[test]
fn in_f16_the_best_token_is_the_same_wherever_it_is_clearly_the_best() {
    let gpu = gpu();
    if !gpu.caps().f16 {
        println!("this device has no f16: nothing was run");
        return;
    }
    for name in MODELS {
        let golden = Golden::new(name);
        let model = golden.model(gpu, DType::F16);
        let memory = model.encode(&golden.sources(), false).unwrap();
        let forward = model.forward(&memory, &golden.targets(), false).unwrap();
        let got = gpu.read_floats(&forward.logits).unwrap();
        let (shape, want) = golden.floats("logits");
        let largest = want.iter().fold(0f64, |a, b| a.max(b.abs()));
        let (error, bound) = (worst(&got, &want), F16_ERROR * largest);
        let (mut clear, mut rows) = (0, 0);
        for (got, want) in got.chunks(shape[2]).zip(want.chunks(shape[2])) {
            let mut order: Vec<usize> = (0..want.len()).collect();
            order.sort_by(|&a, &b| want[b].total_cmp(&want[a]));
            rows += 1;
            if want[order[0]] - want[order[1]] > bound {
                let best = (0..got.len()).max_by(|&a, &b| got[a].total_cmp(&got[b]));
                assert_eq!(best, Some(order[0]), "{name} row {rows}");
                clear += 1;
            }
        }
        println!(
            "{name}: worst {error:.1e} of {largest:.1}, {clear} of {rows} positions are clear"
        );
        assert!(error <= bound, "{name}: {error} of {bound}");
        assert!(clear * 10 >= rows * 9, "{name}: {clear} of {rows}");
    }
}

#[test]
fn settings_that_are_not_honoured_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Golden::new("relu").dir;
    std::fs::copy(golden.join("config.json"), dir.path().join("config.json")).unwrap();
    let text = std::fs::read(golden.join("generation_config.json")).unwrap();
    let cases: [(&str, serde_json::Value); 13] = [
        ("watermarking_config", serde_json::json!({"bias": 2.0})),
        ("dola_layers", "high".into()),
        ("max_time", 2.5.into()),
        ("penalty_alpha", 0.6.into()),
        ("num_beams", 2.5.into()),
        ("max_new_tokens", (-1).into()),
        ("renormalize_logits", "yes".into()),
        ("do_sample", true.into()),
        ("no_repeat_ngram_size", 3.into()),
        ("repetition_penalty", 1.2.into()),
        ("min_length", 5.into()),
        ("sequence_bias", serde_json::json!([[[1], 2.0]])),
        ("early_stopping", "sometimes".into()),
    ];
    for (key, value) in cases {
        let mut json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        json[key] = value;
        std::fs::write(dir.path().join("generation_config.json"), json.to_string()).unwrap();
        let refused = Settings::load(&Source::Directory(dir.path().into())).unwrap_err();
        assert!(refused.to_string().contains(key), "{refused}");
    }
    let mut json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    (json["do_sample"], json["repetition_penalty"]) = (false.into(), 1.into());
    json["renormalize_logits"] = true.into();
    std::fs::write(dir.path().join("generation_config.json"), json.to_string()).unwrap();
    assert!(
        Settings::load(&Source::Directory(dir.path().into()))
            .unwrap()
            .renormalize
    );
}

#[test]
fn settings_name_the_file_that_they_stand_in() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Golden::new("relu").dir;
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(golden.join(name)).unwrap()).unwrap()
    };
    let (config, generation) = (read("config.json"), read("generation_config.json"));
    let source = Source::Directory(dir.path().into());
    let said = |config: &serde_json::Value, generation: Option<&serde_json::Value>| {
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let path = dir.path().join("generation_config.json");
        let _ = std::fs::remove_file(&path);
        if let Some(json) = generation {
            std::fs::write(&path, json.to_string()).unwrap();
        }
        Settings::load(&source).unwrap_err().to_string()
    };
    let with = |json: &serde_json::Value, key: &str, value: serde_json::Value| {
        let mut json = json.clone();
        json[key] = value;
        json
    };
    let old = with(&config, "no_repeat_ngram_size", 3.into());
    assert!(said(&old, None).contains("/config.json is 3"));
    let new = with(&generation, "no_repeat_ngram_size", 3.into());
    assert!(said(&config, Some(&new)).contains("generation_config.json is 3"));
    // An id that only config.json has.
    let absent = with(&generation, "eos_token_id", serde_json::Value::Null);
    let wrong = with(&config, "eos_token_id", "end".into());
    assert!(said(&wrong, Some(&absent)).contains("/config.json is \"end\""));
    let neither = with(&config, "eos_token_id", serde_json::Value::Null);
    let words = said(&neither, Some(&absent));
    assert!(
        words.contains("generation_config.json: there is no eos_token_id"),
        "{words}"
    );
}

#[test]
fn decoder_only_models_wish_ends_and_a_penalty_and_nothing_that_is_not_honoured() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::Directory(dir.path().into());
    let load = |generation: Option<serde_json::Value>| {
        let path = dir.path().join("generation_config.json");
        let _ = std::fs::remove_file(&path);
        if let Some(json) = generation {
            std::fs::write(&path, json.to_string()).unwrap();
        }
        CausalWishes::load(&source)
    };
    let config = serde_json::json!({"eos_token_id": 7, "repetition_penalty": 1.5});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let wishes = |eos: &[u32], repeat_penalty| CausalWishes {
        eos: eos.to_vec(),
        repeat_penalty,
    };
    assert_eq!(load(None).unwrap(), wishes(&[7], 1.5));
    // As chat models have them: how texts are drawn is the caller's to say.
    let chat = serde_json::json!({
        "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 2, "do_sample": true, "temperature": 0.7,
        "top_k": 20, "top_p": 0.8, "min_p": 0.0, "typical_p": 0.9, "max_length": 4096, "max_new_tokens": 512,
        "repetition_penalty": 1.05, "transformers_version": "4.37.0", "suppress_tokens": [], "min_length": 0,
        "num_beams": 1, "token_healing": false, "guidance_scale": null,
    });
    assert_eq!(load(Some(chat.clone())).unwrap(), wishes(&[2, 3], 1.05));
    let empty = serde_json::json!({});
    assert_eq!(load(Some(empty)).unwrap(), wishes(&[7], 1.0));
    for (key, value) in [
        ("no_repeat_ngram_size", 3.into()),
        ("min_length", 5.into()),
        ("min_new_tokens", 5.into()),
        ("num_beams", 4.into()),
        ("bad_words_ids", serde_json::json!([[5]])),
        ("suppress_tokens", serde_json::json!([5])),
        ("begin_suppress_tokens", serde_json::json!([5])),
        ("forced_bos_token_id", 5.into()),
        ("forced_eos_token_id", 5.into()),
        ("sequence_bias", serde_json::json!([[[1], 2.0]])),
        (
            "exponential_decay_length_penalty",
            serde_json::json!([3, 1.1]),
        ),
        ("guidance_scale", 1.5.into()),
        ("penalty_alpha", 0.6.into()),
        ("watermarking_config", serde_json::json!({"bias": 2.0})),
        ("dola_layers", "low".into()),
        ("max_time", 1.into()),
        ("stop_strings", serde_json::json!(["."])),
        ("token_healing", true.into()),
        ("repetition_penalty", "much".into()),
        ("eos_token_id", (-1).into()),
    ] {
        let mut json = chat.clone();
        json[key] = value;
        let said = load(Some(json)).expect_err(key).to_string();
        let names = [key, "generation_config.json"];
        assert!(names.iter().all(|name| said.contains(name)), "{said}");
    }
}

#[test]
fn positions_that_no_kernel_binds_are_refused_before_they_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Golden::new("relu").dir;
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let positions = 1u32 << 20;
    json["max_position_embeddings"] = positions.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let bytes = u64::from(positions) * json["d_model"].as_u64().unwrap() * 4;
    let caps = gpu().caps().clone();
    let small = gpu().narrowed(qkv::gpu::Caps {
        max_binding: bytes - 1,
        ..caps
    });
    let started = std::time::Instant::now();
    let source = Source::Directory(dir.path().into());
    let loaded = Model::load(&small, &source, DType::F32, &mut |_, _| {});
    let said = loaded.err().expect("a refusal").to_string();
    assert!(
        said.contains(&format!(
            "a table of {positions} positions is {bytes} bytes"
        )),
        "{said}"
    );
    // The sines of a million positions would take longer.
    println!("{:?}", started.elapsed());
}

#[test]
fn renormalized_scores_are_over_the_tokens_that_may_be_written() {
    let gpu = gpu();
    let golden = Golden::new("relu");
    let model = golden.model(gpu, DType::F32);
    let memory = model.encode(&golden.sources(), false).unwrap();
    let mut settings = settings(&golden, "greedy");
    settings.suppressed = (0..40).filter(|id| !settings.eos.contains(id)).collect();
    settings.forced_eos = None;
    settings.renormalize = true;
    let mut generator = Generator::new(&model, &memory, &settings).unwrap();
    generator.by_ref().for_each(|step| drop(step.unwrap()));
    let sequences = generator.sequences();
    let read: Vec<Vec<u32>> = sequences
        .iter()
        .map(|sequence| [&[settings.start], &sequence.tokens[..]].concat())
        .collect();
    let targets = Padded::new(&read, 0);
    let forward = model.forward(&memory, &targets, false).unwrap();
    let logits = gpu.read_floats(&forward.logits).unwrap();
    let vocab = model.spec().target_vocab as usize;
    for (row, sequence) in sequences.iter().enumerate() {
        let mut want = 0.0;
        for (step, &token) in sequence.tokens.iter().enumerate() {
            let at = (row * targets.len as usize + step) * vocab;
            let logits = &logits[at..at + vocab];
            let open = (0..vocab as u32).filter(|id| !settings.suppressed.contains(id));
            let sum: f64 = open.map(|id| (logits[id as usize] as f64).exp()).sum();
            want += logits[token as usize] as f64 - sum.ln();
        }
        assert!(
            (want - sequence.score as f64).abs() < 1e-3,
            "{want} {}",
            sequence.score
        );
    }
}
