//! Small models of the known families against what Hugging Face transformers makes of them
//! (tests/goldens/causal).

use std::path::{Path, PathBuf};

use qkv::generate::CausalSettings;
use qkv::gpu::DType;
use qkv::model::{AnyModel, CausalModel, Padded, Rope, RopeScaling, Source, yarn_attention_factor};
use qkv::ops::Pairs;
use qkv::reference::rope_frequencies;
use safetensors::SafeTensors;

use crate::maker::scaling_of;
use crate::{generate, gpu};

const MODELS: [&str; 8] = [
    "llama",
    "llama3",
    "llama-yarn",
    "llama-linear",
    "llama-dynamic",
    "mistral",
    "qwen2",
    "qwen3",
];

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/causal")
}

pub struct Golden {
    pub dir: PathBuf,
    bytes: Vec<u8>,
}

impl Golden {
    pub fn new(name: &str) -> Self {
        let dir = goldens().join(name);
        let bytes = std::fs::read(dir.join("goldens.safetensors")).unwrap();
        Golden { dir, bytes }
    }

    pub fn floats(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let words = view.data().as_chunks::<4>().0.iter();
        let values = words.map(|&b| f32::from_le_bytes(b).into()).collect();
        (view.shape().to_vec(), values)
    }

    /// Integers by row, where the goldens have them.
    fn rows(&self, name: &str) -> Option<Vec<Vec<u32>>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        let words = view.data().as_chunks::<8>().0.iter();
        let ids: Vec<u32> = words.map(|&b| i64::from_le_bytes(b) as u32).collect();
        Some(ids.chunks(view.shape()[1]).map(<[u32]>::to_vec).collect())
    }

    pub fn tokens(&self) -> Padded {
        let rows = self.rows("input_ids").unwrap();
        let mask = self.rows("attention_mask").unwrap();
        Padded {
            len: rows[0].len() as u32,
            lengths: mask.iter().map(|row| row.iter().sum()).collect(),
            ids: rows.concat(),
        }
    }

    pub fn model(&self, dtype: DType) -> CausalModel {
        let source = Source::Directory(self.dir.clone());
        match AnyModel::load(gpu(), &source, dtype, &mut |_, _| {}).unwrap() {
            AnyModel::Causal(model) => *model,
            AnyModel::EncoderDecoder(_) => panic!("it is decoder-only"),
        }
    }
}

/// The largest difference between rows of real tokens; `row` is a row's number in `[B, ..., T]`.
pub fn worst(got: &[f32], want: &[f64], columns: usize, real: impl Fn(usize) -> bool) -> f64 {
    assert_eq!(got.len(), want.len());
    let rows = got.chunks(columns).zip(want.chunks(columns)).enumerate();
    let mut worst = 0f64;
    for (_, (got, want)) in rows.filter(|&(row, _)| real(row)) {
        for (&got, want) in got.iter().zip(want) {
            let error = (f64::from(got) - want).abs();
            worst = if error.is_nan() {
                f64::INFINITY
            } else {
                worst.max(error)
            };
        }
    }
    worst
}

#[test]
fn logits_and_attentions_equal_transformers() {
    for name in MODELS {
        let golden = Golden::new(name);
        let model = golden.model(DType::F32);
        let tokens = golden.tokens();
        let (len, heads) = (tokens.len as usize, model.spec().heads.heads as usize);
        let forward = model.forward(&tokens, true).unwrap();
        // Padding within its row's window sees its row's tokens, as in transformers; where it sees none,
        // transformers lets it see everything.
        let whole = model.spec().windows.iter().all(Option::is_none);
        let real =
            |sequence: usize, row: usize| whole || row % len < tokens.lengths[sequence] as usize;
        let (shape, want) = golden.floats("logits");
        assert_eq!(
            forward.logits.shape(),
            shape.iter().map(|&n| n as u32).collect::<Vec<_>>()
        );
        let got = gpu().read_floats(&forward.logits).unwrap();
        let logits = worst(&got, &want, shape[2], |row| real(row / len, row));
        let mut attentions = 0f64;
        for (ix, tensor) in forward.attentions.iter().enumerate() {
            let (shape, want) = golden.floats(&format!("attentions.{ix}"));
            assert_eq!(
                tensor.shape(),
                shape.iter().map(|&n| n as u32).collect::<Vec<_>>()
            );
            let got = gpu().read_floats(tensor).unwrap();
            let error = worst(&got, &want, len, |row| real(row / len / heads, row));
            attentions = attentions.max(error);
        }
        println!("{name}: logits {logits:.1e}, attentions {attentions:.1e}");
        assert!(logits <= 1e-3 && attentions <= 1e-4, "{name}");
    }
}

#[test]
fn greedy_texts_equal_transformers() {
    let mut texts = 0;
    for name in MODELS {
        let golden = Golden::new(name);
        let Some(want) = golden.rows("greedy_ids") else {
            continue;
        };
        let model = golden.model(DType::F32);
        let tokens = golden.tokens();
        let rows = tokens.ids.chunks(tokens.len as usize).zip(&tokens.lengths);
        let prompts: Vec<Vec<u32>> = rows.map(|(row, &n)| row[..n as usize].to_vec()).collect();
        let eos = golden.rows("eos").unwrap()[0][0];
        let settings = |eos| CausalSettings::greedy(want[0].len() as u32, eos);
        let free = generate(&model, &prompts, &settings(Vec::new()));
        let ended = generate(&model, &prompts, &settings(vec![eos]));
        for (row, want) in want.iter().enumerate() {
            assert_eq!(&free[row].tokens, want, "{name}");
            let end = want.iter().position(|&token| token == eos);
            assert_eq!(
                ended[row].tokens,
                want[..end.map_or(want.len(), |end| end + 1)],
                "{name}"
            );
            let alone = generate(&model, &prompts[row..=row], &settings(Vec::new()));
            assert_eq!(&alone[0].tokens, want, "{name} alone");
            texts += 1;
        }
    }
    assert_eq!(texts, 21);
}

/// In f16 weights and activations are rounded; logits may be off by this part of the largest.
const F16_ERROR: f64 = 0.01;

#[test]
fn in_f16_logits_are_off_by_no_more_than_rounding() {
    if !gpu().caps().f16 {
        println!("this device has no f16: nothing was run");
        return;
    }
    for name in MODELS {
        let golden = Golden::new(name);
        let tokens = golden.tokens();
        let len = tokens.len as usize;
        let forward = golden.model(DType::F16).forward(&tokens, false).unwrap();
        let got = gpu().read_floats(&forward.logits).unwrap();
        let (shape, want) = golden.floats("logits");
        let largest = want.iter().fold(0f64, |a, b| a.max(b.abs()));
        let real = |row: usize| row % len < tokens.lengths[row / len] as usize;
        let error = worst(&got, &want, shape[2], real);
        println!("{name}: {error:.1e} of {largest:.1}");
        assert!(error <= F16_ERROR * largest, "{name}");
    }
}

#[test]
fn frequencies_of_every_scaling_equal_transformers_and_the_oracle() {
    let text = std::fs::read(goldens().join("rope.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    for case in &cases {
        let number = |key: &str| case[key].as_f64();
        let must = |key: &str| number(key).unwrap();
        let original = number("original_max_position_embeddings");
        let factor = must("factor");
        let scaling = match case["rope_type"].as_str().unwrap() {
            "linear" => RopeScaling::Linear { factor },
            "dynamic" => RopeScaling::Dynamic {
                factor,
                original: must("max_position_embeddings") as u32,
            },
            "yarn" => RopeScaling::Yarn {
                factor,
                original: original.unwrap() as u32,
                beta_fast: number("beta_fast").unwrap_or(32.0),
                beta_slow: number("beta_slow").unwrap_or(1.0),
                truncate: case["truncate"].as_bool().unwrap_or(true),
                attention_factor: match number("mscale") {
                    Some(over) => {
                        let under = must("mscale_all_dim");
                        yarn_attention_factor(factor, over) / yarn_attention_factor(factor, under)
                    }
                    None => yarn_attention_factor(factor, 1.0),
                },
            },
            "llama3" => RopeScaling::Llama3 {
                factor,
                low: must("low_freq_factor"),
                high: must("high_freq_factor"),
                original: original.unwrap() as u32,
            },
            other => panic!("{other}"),
        };
        let dims = must("head_dim") as usize;
        let rope = Rope {
            base: must("rope_theta"),
            columns: dims as u32,
            pairs: Pairs::Halves,
            scaling,
        };
        let context = must("context") as u32;
        let rotary = rope.rotary(gpu(), context).unwrap();
        let turns = gpu().read_u32(&rotary.turns).unwrap();
        let oracle = rope_frequencies(dims, rope.base, scaling_of(&rope.scaling, context as usize));
        let theirs = case["frequencies"].as_array().unwrap();
        assert_eq!(
            [turns.len(), oracle.len(), theirs.len()],
            [dims, dims / 2, dims / 2]
        );
        for ((pair, oracle), theirs) in turns.chunks(2).zip(&oracle).zip(theirs) {
            let units = (u64::from(pair[0]) << 12) + u64::from(pair[1]);
            let ours = units as f64 / 2f64.powi(44) * std::f64::consts::TAU;
            assert!((ours - oracle).abs() < 1e-12, "{case}: {ours} {oracle}");
            let theirs = theirs.as_f64().unwrap();
            assert!(
                (oracle / theirs - 1.0).abs() < 1e-5,
                "{case}: {oracle} {theirs}"
            );
        }
        let factor_is = must("attention_factor_is");
        assert!(
            (f64::from(rotary.attention_factor) - factor_is).abs() < 1e-6,
            "{case}"
        );
    }
    assert_eq!(cases.len(), 7);
}

/// Writes another config beside the weights of a golden model and loads it.
fn load_with(
    name: &str,
    change: impl FnOnce(&mut serde_json::Value),
) -> Result<CausalModel, String> {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(goldens().join(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let source = Source::Directory(dir.path().to_owned());
    match AnyModel::load(gpu(), &source, DType::F32, &mut |_, _| {}) {
        Ok(AnyModel::Causal(model)) => Ok(*model),
        Ok(AnyModel::EncoderDecoder(_)) => panic!("it is decoder-only"),
        Err(e) => Err(e.to_string()),
    }
}

type Change = fn(&mut serde_json::Value);

#[test]
fn configs_that_are_not_honoured_are_refused_by_name() {
    let cases: [(&str, Change, &str); 27] = [
        ("llama", |c| c["model_type"] = "gemma".into(), "gemma"),
        (
            "llama",
            |c| c["architectures"] = serde_json::json!(["LlamaForSequenceClassification"]),
            "LlamaForSequenceClassification",
        ),
        ("llama", |c| c["hidden_act"] = "mish".into(), "mish"),
        (
            "llama",
            |c| c["rope_parameters"]["rope_type"] = "longrope".into(),
            "longrope",
        ),
        (
            "llama",
            |c| c["rope_parameters"]["factor"] = 2.into(),
            "rope_parameters.factor",
        ),
        (
            "llama",
            |c| c["rope_parameters"]["rope_theta"] = "big".into(),
            "rope_theta",
        ),
        (
            "llama",
            |c| c["rope_parameters"] = serde_json::json!({"full_attention": {"rope_theta": 1e4}}),
            "full_attention",
        ),
        (
            "llama",
            |c| c["partial_rotary_factor"] = 0.5.into(),
            "partial_rotary_factor",
        ),
        (
            "llama",
            |c| c["quantization_config"] = serde_json::json!({"bits": 4}),
            "quantization_config",
        ),
        (
            "llama",
            |c| {
                c["hidden_size"] = 37.into();
                c["head_dim"].take();
            },
            "num_attention_heads",
        ),
        (
            "llama",
            |c| c["num_hidden_layers"] = u32::MAX.into(),
            "num_hidden_layers",
        ),
        (
            "qwen2",
            |c| c["num_hidden_layers"] = 0.into(),
            "num_hidden_layers",
        ),
        ("llama", |c| c["is_causal"] = false.into(), "is_causal"),
        (
            "llama",
            |c| c["rope_scaling"] = serde_json::json!({"rope_type": "linear", "factor": 2.0}),
            "rope_scaling",
        ),
        (
            "llama-yarn",
            |c| c["original_max_position_embeddings"] = 0.into(),
            "original_max_position_embeddings",
        ),
        ("llama", |c| c["num_attention_heads"] = 0.into(), "head"),
        ("llama", |c| c["num_key_value_heads"] = 4.into(), "KV heads"),
        (
            "llama",
            |c| c["vocab_size"] = 97.into(),
            "model.embed_tokens.weight",
        ),
        ("llama", |c| c["num_hidden_layers"] = 1.into(), "no place"),
        (
            "llama",
            |c| c["num_hidden_layers"] = 3.into(),
            "model.layers.2",
        ),
        (
            "llama",
            |c| c["tie_word_embeddings"] = false.into(),
            "lm_head.weight",
        ),
        (
            "llama",
            |c| c["attention_bias"] = true.into(),
            "q_proj.bias",
        ),
        (
            "llama3",
            |c| drop(c["rope_parameters"]["factor"].take()),
            "rope_parameters.factor",
        ),
        ("llama3", |c| c["mlp_bias"] = false.into(), "no place"),
        ("mistral", |c| c["sliding_window"] = 0.into(), "window"),
        (
            "qwen2",
            |c| c["use_sliding_window"] = false.into(),
            "layer_types",
        ),
        (
            "qwen2",
            |c| c["layer_types"][0] = "chunked_attention".into(),
            "chunked_attention",
        ),
    ];
    for (name, change, word) in cases {
        let said = load_with(name, change)
            .err()
            .unwrap_or_else(|| panic!("{word}: taken"));
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn older_configs_say_the_same() {
    // As transformers 4 wrote them.
    let old = load_with("llama3", |c| {
        let mut rope = c["rope_parameters"].take();
        c["rope_theta"] = rope["rope_theta"].take();
        rope["type"] = rope["rope_type"].take();
        c.as_object_mut().unwrap().remove("rope_parameters");
        c["rope_scaling"] = rope;
    });
    let new = Golden::new("llama3").model(DType::F32);
    assert_eq!(old.unwrap().spec(), new.spec());
    let both = load_with("llama3", |c| {
        c["rope_scaling"] = c["rope_parameters"].clone();
        c["is_causal"] = true.into();
    });
    assert_eq!(both.unwrap().spec(), new.spec());
    // What stands beside the rotary parameters goes.
    let outer = load_with("llama3", |c| {
        c["rope_parameters"]["original_max_position_embeddings"] = 3.into();
        c["original_max_position_embeddings"] = 16.into();
    });
    assert_eq!(outer.unwrap().spec(), new.spec());
    let empty = load_with("llama3", |c| {
        c["rope_scaling"] = c["rope_parameters"].take();
        c["rope_parameters"] = serde_json::json!({});
    });
    assert_eq!(empty.unwrap().spec(), new.spec());
    let old = load_with("qwen2", |c| drop(c["layer_types"].take()));
    assert_eq!(old.unwrap().spec().windows, [None, Some(4)]);
    let plain = load_with("mistral", |c| c["sliding_window"] = serde_json::Value::Null);
    assert_eq!(plain.unwrap().spec().windows, [None, None]);
}

/// A model whose first weight is 70,000, which f16 does not have.
#[test]
fn weights_that_f16_does_not_hold_are_refused_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let golden = goldens().join("llama");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let info = metadata.info(name).unwrap();
    assert_eq!(info.dtype, safetensors::Dtype::F32);
    let at = header + 8 + info.data_offsets.0;
    let source = Source::Directory(dir.path().to_owned());
    let mut load = |x: f32, dtype| {
        bytes[at..at + 4].copy_from_slice(&x.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let loaded = CausalModel::load(gpu(), &source, dtype, &mut |_, _| {});
        loaded.map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(load(-7e4, DType::F32), Ok(()));
    if !gpu().caps().f16 {
        println!("this device has no f16: the rest was not run");
        return;
    }
    assert_eq!(load(-65504.0, DType::F16), Ok(()));
    let said = load(-7e4, DType::F16).unwrap_err();
    assert!(
        said.contains(name) && said.contains("-70000") && said.contains("65504"),
        "{said}"
    );
}

#[test]
fn matrices_that_no_kernel_binds_are_refused_before_they_are_made() {
    // 96 tokens of 36 columns in f32 are 13,824 bytes.
    let small = |max_binding| {
        let caps = gpu().caps().clone();
        gpu().narrowed(qkv::gpu::Caps {
            max_binding,
            ..caps
        })
    };
    let source = Source::Directory(goldens().join("llama"));
    let load = |max_binding| {
        let loaded = CausalModel::load(&small(max_binding), &source, DType::F32, &mut |_, _| {});
        loaded.map(|_| ()).map_err(|e| e.to_string())
    };
    let said = load(13_823).unwrap_err();
    assert!(
        said.contains("model.embed_tokens.weight is 13824 bytes") && said.contains("13823"),
        "{said}"
    );
    assert_eq!(load(36 * 112 * 4), Ok(()));
}

#[test]
fn a_damaged_index_is_refused() {
    let index = "model.safetensors.index.json";
    for (change, word) in [
        (
            r#"{"weight_map": {"a": "../model.safetensors"}}"#,
            "a is in no",
        ),
        (
            r#"{"weight_map": {"a": "elsewhere.safetensors"}}"#,
            "elsewhere.safetensors",
        ),
        (r#"{"weight_map": {"a": 1}}"#, "a is in no"),
        (r#"{"weight_map": {}}"#, "empty"),
        (r#"{}"#, "no weight_map"),
        (
            r#"{"weight_map": {"a": "model-00001-of-00003.safetensors"}}"#,
            "there is no tensor",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(goldens().join("llama3")).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        std::fs::write(dir.path().join(index), change).unwrap();
        let source = Source::Directory(dir.path().to_owned());
        let loaded = CausalModel::load(gpu(), &source, DType::F32, &mut |_, _| {});
        let said = loaded.err().expect(word).to_string();
        assert!(said.contains(word), "{said}");
    }
}
