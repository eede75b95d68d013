//! Llama and the families made after it, Mistral, Qwen2 and Qwen3 (SmolLM2 and TinyLlama are Llama).
//! Only data: how their configs give a [`CausalSpec`], and what their tensors are called.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::causal::{CausalNames, MAX_LAYERS, MAX_POSITIONS};
use super::{CausalSpec, Rope, RopeScaling, activation, yarn_attention_factor};
use crate::layers::Heads;
use crate::ops::Pairs;
use crate::{Error, Result};

/// What `model_type` may be.
pub(super) const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

#[derive(Deserialize)]
struct Config {
    model_type: String,
    architectures: Option<Vec<String>>,
    hidden_size: u32,
    intermediate_size: u32,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    vocab_size: u32,
    max_position_embeddings: u32,
    hidden_act: String,
    #[serde(default = "small")]
    rms_norm_eps: f32,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<u32>,
    max_window_layers: Option<u32>,
    layer_types: Option<Vec<String>>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    rope_scaling: Option<serde_json::Map<String, Value>>,
    rope_parameters: Option<serde_json::Map<String, Value>>,
    original_max_position_embeddings: Option<u32>,
    is_causal: Option<bool>,
    quantization_config: Option<Value>,
}

fn small() -> f32 {
    1e-6
}

fn refuse<T>(path: &Path, key: &str, value: String, bound: &str) -> Result<T> {
    let what = format!("{key} in {}", path.display());
    Err(Error::refused(what, value, bound))
}

/// The spec of a config of these families.
pub(super) fn spec(path: &Path, json: &Value) -> Result<CausalSpec> {
    let config = Config::deserialize(json).map_err(|e| Error::file(path, e))?;
    let family = config.model_type.as_str();
    let class = match family {
        "llama" => "LlamaForCausalLM",
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        other => {
            let known = format!("{} are known", FAMILIES.join(", "));
            return refuse(path, "model_type", other.into(), &known);
        }
    };
    if let Some(classes) = &config.architectures
        && *classes != [class]
    {
        let only = format!("only {class} is known of {family}");
        return refuse(path, "architectures", classes.join(", "), &only);
    }
    if let Some(how) = &config.quantization_config {
        return refuse(
            path,
            "quantization_config",
            how.to_string(),
            "f32, f16 or bf16 weights",
        );
    }
    if config.is_causal == Some(false) {
        let bound = "true: decoders look back only";
        return refuse(path, "is_causal", "false".into(), bound);
    }
    if let (Some(new), Some(old)) = (&config.rope_parameters, &config.rope_scaling)
        && !new.is_empty()
        && !old.is_empty()
        && new != old
    {
        let old = Value::Object(old.clone()).to_string();
        return refuse(path, "rope_scaling", old, "absent, or as rope_parameters");
    }
    let heads = config.num_attention_heads;
    let kv_heads = match (config.num_key_value_heads, family) {
        (Some(n), _) => n,
        (None, "llama") => heads,
        (None, _) => return refuse(path, "num_key_value_heads", "absent".into(), "a number"),
    };
    let head_dim = match (config.head_dim, family) {
        (Some(n), _) => n,
        (None, "qwen3") => 128,
        (None, _) if heads > 0 && config.hidden_size.is_multiple_of(heads) => {
            config.hidden_size / heads
        }
        (None, _) => {
            let bound = format!("a divisor of the width, {}", config.hidden_size);
            return refuse(path, "num_attention_heads", heads.to_string(), &bound);
        }
    };
    // Lists of layers are made before tensors are looked for.
    let layers = config.num_hidden_layers;
    if layers == 0 || layers > MAX_LAYERS {
        let bound = format!("1 to {MAX_LAYERS}");
        return refuse(path, "num_hidden_layers", layers.to_string(), &bound);
    }
    // Llama's and Qwen3's switches, which the others do not look at.
    let bias = config.attention_bias && matches!(family, "llama" | "qwen3");
    Ok(CausalSpec {
        width: config.hidden_size,
        vocab: config.vocab_size,
        layers,
        heads: Heads {
            heads,
            kv_heads,
            head_dim,
        },
        ffn: config.intermediate_size,
        activation: activation(path, "hidden_act", &config.hidden_act)?,
        norm_eps: config.rms_norm_eps,
        qk_norm: family == "qwen3",
        qkv_bias: bias || family == "qwen2",
        out_bias: bias,
        ffn_bias: config.mlp_bias && family == "llama",
        windows: windows(path, json, &config)?,
        max_positions: context(&config, path)?,
        rope: Rope {
            base: base(&config, path)?,
            columns: head_dim,
            pairs: Pairs::Halves,
            scaling: scaling(&config, path)?,
        },
        tied_logits: config.tie_word_embeddings,
    })
}

/// Each layer's window.
fn windows(path: &Path, json: &Value, config: &Config) -> Result<Vec<Option<u32>>> {
    let layers = config.num_hidden_layers as usize;
    let types = config.layer_types.as_deref();
    match config.model_type.as_str() {
        "qwen2" | "qwen3" => {
            let window = match config.use_sliding_window {
                // What transformers takes where the key is absent.
                true if json.get("sliding_window").is_none() => Some(4096),
                true => config.sliding_window,
                false => None,
            };
            let Some(types) = types else {
                let first = config.max_window_layers.unwrap_or(28) as usize;
                let window = |ix| window.filter(|_| ix >= first);
                return Ok((0..layers).map(window).collect());
            };
            if types.len() != layers {
                let bound = format!("one for each of {layers} layers");
                return refuse(
                    path,
                    "layer_types",
                    format!("{} of them", types.len()),
                    &bound,
                );
            }
            types
                .iter()
                .map(|kind| match kind.as_str() {
                    "full_attention" => Ok(None),
                    "sliding_attention" if window.is_some() => Ok(window),
                    "sliding_attention" => {
                        let bound =
                            "full_attention, as use_sliding_window and sliding_window give none";
                        refuse(path, "layer_types", kind.clone(), bound)
                    }
                    other => {
                        let bound = "full_attention and sliding_attention are known";
                        refuse(path, "layer_types", other.into(), bound)
                    }
                })
                .collect()
        }
        family => {
            let other = |kind: &&String| match config.sliding_window {
                Some(_) if family == "mistral" => *kind != "sliding_attention",
                _ => *kind != "full_attention",
            };
            if let Some(kind) = types.into_iter().flatten().find(other) {
                let bound = "absent: all layers of this family are alike";
                return refuse(path, "layer_types", kind.clone(), bound);
            }
            let window = match family {
                "mistral" if json.get("sliding_window").is_none() => Some(4096),
                "mistral" => config.sliding_window,
                _ => None,
            };
            Ok(vec![window; layers])
        }
    }
}

/// The rotary parameters, under their name of transformers 5 or an older one, and that name.
fn parameters(config: &Config) -> (Option<&serde_json::Map<String, Value>>, &'static str) {
    match (&config.rope_parameters, &config.rope_scaling) {
        (Some(new), None) => (Some(new), "rope_parameters"),
        (Some(new), Some(_)) if !new.is_empty() => (Some(new), "rope_parameters"),
        (_, old) => (old.as_ref(), "rope_scaling"),
    }
}

/// One rotary parameter, where it is given.
fn number(config: &Config, path: &Path, key: &str) -> Result<Option<f64>> {
    let (map, name) = parameters(config);
    match map
        .and_then(|map| map.get(key))
        .filter(|value| !value.is_null())
    {
        None => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or_else(|| {
            let what = format!("{name}.{key} in {}", path.display());
            Error::refused(what, value, "a number")
        }),
    }
}

fn base(config: &Config, path: &Path) -> Result<f64> {
    let own = number(config, path, "rope_theta")?;
    Ok(own.or(config.rope_theta).unwrap_or(10000.0))
}

/// The context that a scaling starts from; what stands beside the rotary parameters goes, as in transformers.
fn original(config: &Config, path: &Path) -> Result<u32> {
    let key = "original_max_position_embeddings";
    let outer = config.original_max_position_embeddings.map(f64::from);
    match outer.or(number(config, path, key)?) {
        None => Ok(config.max_position_embeddings),
        Some(n) if n >= 1.0 && n <= f64::from(u32::MAX) && n.fract() == 0.0 => Ok(n as u32),
        Some(n) => Err(Error::refused(
            format!("{key} in {}", path.display()),
            n,
            "a whole number of positions",
        )),
    }
}

fn scaling(config: &Config, path: &Path) -> Result<RopeScaling> {
    let (map, name) = parameters(config);
    let given = |key: &str| {
        map.and_then(|map| map.get(key))
            .filter(|value| !value.is_null())
    };
    let kind = match given("rope_type").or(given("type")) {
        None => "default",
        Some(Value::String(kind)) => kind.as_str(),
        Some(other) => {
            return refuse(
                path,
                &format!("{name}.rope_type"),
                other.to_string(),
                "a name",
            );
        }
    };
    // What each kind reads; a parameter that it does not read must not be there.
    let read: &[&str] = match kind {
        "default" => &[],
        "linear" | "dynamic" => &["factor"],
        "yarn" => &[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
        "llama3" => &[
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        ],
        other => {
            let bound = "default, linear, dynamic, yarn and llama3 are known";
            return refuse(path, &format!("{name}.rope_type"), other.into(), bound);
        }
    };
    let always = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    for (key, value) in map.into_iter().flatten() {
        if !value.is_null() && !always.contains(&key.as_str()) && !read.contains(&key.as_str()) {
            let bound = format!("absent: rope_type {kind} has no such parameter");
            return refuse(path, &format!("{name}.{key}"), value.to_string(), &bound);
        }
    }
    let partial = number(config, path, "partial_rotary_factor")?.or(config.partial_rotary_factor);
    if let Some(part) = partial.filter(|&part| part != 1.0) {
        let bound = "1: heads of these families turn whole";
        return refuse(
            path,
            &format!("{name}.partial_rotary_factor"),
            part.to_string(),
            bound,
        );
    }
    let get = |key: &str| number(config, path, key);
    let must = |key: &str| match number(config, path, key)? {
        Some(value) => Ok(value),
        None => refuse(path, &format!("{name}.{key}"), "absent".into(), "a number"),
    };
    Ok(match kind {
        "linear" => RopeScaling::Linear {
            factor: must("factor")?,
        },
        "dynamic" => RopeScaling::Dynamic {
            factor: must("factor")?,
            original: config.max_position_embeddings,
        },
        "yarn" => {
            let original = original(config, path)?;
            let stretched = f64::from(config.max_position_embeddings) / f64::from(original);
            let factor = get("factor")?.unwrap_or(stretched);
            // Zero counts as absent, as transformers has it.
            let nonzero = |key: &str| Ok::<_, Error>(get(key)?.filter(|&value| value != 0.0));
            let inferred = match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                (Some(over), Some(under)) => {
                    yarn_attention_factor(factor, over) / yarn_attention_factor(factor, under)
                }
                _ => yarn_attention_factor(factor, 1.0),
            };
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                truncate: match given("truncate") {
                    None => true,
                    Some(Value::Bool(truncate)) => *truncate,
                    Some(other) => {
                        let key = format!("{name}.truncate");
                        return refuse(path, &key, other.to_string(), "true or false");
                    }
                },
                attention_factor: get("attention_factor")?.unwrap_or(inferred),
            }
        }
        "llama3" => RopeScaling::Llama3 {
            factor: must("factor")?,
            low: must("low_freq_factor")?,
            high: must("high_freq_factor")?,
            original: original(config, path)?,
        },
        _ => RopeScaling::None,
    })
}

/// The longest context: the config's, or what its scaling stretches that to.
fn context(config: &Config, path: &Path) -> Result<u32> {
    let longest = match scaling(config, path)? {
        RopeScaling::Dynamic { factor, original }
        | RopeScaling::Yarn {
            factor, original, ..
        } => (factor * f64::from(original)) as u32,
        _ => 0,
    };
    Ok(config
        .max_position_embeddings
        .max(longest)
        .min(MAX_POSITIONS))
}

pub(super) const NAMES: CausalNames = CausalNames {
    embedding: "model.embed_tokens.weight",
    layer: "model.layers",
    attention_norm: "input_layernorm",
    projections: [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    ],
    qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
    feed_forward_norm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    norm: "model.norm",
    logits: "lm_head.weight",
    frequencies: "self_attn.rotary_emb.inv_freq",
};
