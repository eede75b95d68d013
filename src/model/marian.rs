//! MarianMT, the family of OPUS-MT: post-norm layers, sinusoidal positions, one bias on the logits.
//! Only data: how its config gives a [`Spec`], and what its tensors are called.

use std::path::Path;

use serde::Deserialize;

use super::{Names, Positions, Spec, Stack, activation};
use crate::layers::NormOrder;
use crate::{Error, Result};

#[derive(Deserialize)]
struct Config {
    d_model: u32,
    vocab_size: u32,
    decoder_vocab_size: Option<u32>,
    encoder_layers: u32,
    encoder_attention_heads: u32,
    encoder_ffn_dim: u32,
    decoder_layers: u32,
    decoder_attention_heads: u32,
    decoder_ffn_dim: u32,
    activation_function: String,
    max_position_embeddings: u32,
    #[serde(default)]
    scale_embedding: bool,
    #[serde(default = "yes")]
    share_encoder_decoder_embeddings: bool,
    #[serde(default = "yes")]
    tie_word_embeddings: bool,
    // Older exports have these at their neutral values, and transformers reads none of them.
    #[serde(default)]
    normalize_before: bool,
    #[serde(default)]
    normalize_embedding: bool,
    #[serde(default)]
    add_final_layer_norm: bool,
    #[serde(default = "yes")]
    static_position_embeddings: bool,
}

fn yes() -> bool {
    true
}

/// The spec of a MarianMT config.
pub(super) fn spec(path: &Path, json: &serde_json::Value) -> Result<Spec> {
    let config = Config::deserialize(json).map_err(|e| Error::file(path, e))?;
    let activation = activation(path, "activation_function", &config.activation_function)?;
    let odd = [
        ("normalize_before", config.normalize_before),
        ("normalize_embedding", config.normalize_embedding),
        ("add_final_layer_norm", config.add_final_layer_norm),
        (
            "static_position_embeddings",
            !config.static_position_embeddings,
        ),
    ];
    if let Some((key, _)) = odd.into_iter().find(|(_, set)| *set) {
        return Err(Error::file(
            path,
            format_args!("{key} is not MarianMT's: transformers would ignore it"),
        ));
    }
    let target_vocab = match config.share_encoder_decoder_embeddings {
        true => config.vocab_size,
        false => config.decoder_vocab_size.unwrap_or(config.vocab_size),
    };
    Ok(Spec {
        width: config.d_model,
        source_vocab: config.vocab_size,
        target_vocab,
        encoder: Stack {
            layers: config.encoder_layers,
            heads: config.encoder_attention_heads,
            ffn: config.encoder_ffn_dim,
        },
        decoder: Stack {
            layers: config.decoder_layers,
            heads: config.decoder_attention_heads,
            ffn: config.decoder_ffn_dim,
        },
        activation,
        order: NormOrder::Post,
        final_norm: false,
        norm_eps: 1e-5,
        embed_scale: match config.scale_embedding {
            true => (config.d_model as f32).sqrt(),
            false => 1.0,
        },
        positions: Positions::Sinusoidal,
        max_positions: config.max_position_embeddings,
        shared_embeddings: config.share_encoder_decoder_embeddings,
        tied_logits: config.tie_word_embeddings,
        logits_bias: true,
    })
}

pub(super) const NAMES: Names = Names {
    shared_embedding: "model.shared.weight",
    source_embedding: "model.encoder.embed_tokens.weight",
    target_embedding: "model.decoder.embed_tokens.weight",
    source_positions: "model.encoder.embed_positions.weight",
    target_positions: "model.decoder.embed_positions.weight",
    logits: "lm_head.weight",
    logits_bias: "final_logits_bias",
    encoder_norm: "model.encoder.layer_norm",
    decoder_norm: "model.decoder.layer_norm",
    encoder_layer: "model.encoder.layers",
    decoder_layer: "model.decoder.layers",
    self_attention: "self_attn",
    cross_attention: "encoder_attn",
    projections: ["q_proj", "k_proj", "v_proj", "out_proj"],
    self_norm: "self_attn_layer_norm",
    cross_norm: "encoder_attn_layer_norm",
    up: "fc1",
    down: "fc2",
    feed_forward_norm: "final_layer_norm",
};
