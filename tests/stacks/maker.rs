//! Stacks with random weights, as a directory for `qkv` and as the oracle's.

use super::*;

/// Stacks that differ in everything that a `Spec` can say.
pub fn specs() -> Vec<(&'static str, Spec)> {
    let stack = |layers, heads, ffn| Stack { layers, heads, ffn };
    vec![
        (
            "pre-norm, learned positions from row 2, GELU, two vocabularies",
            Spec {
                width: 24,
                source_vocab: 37,
                target_vocab: 29,
                encoder: stack(2, 4, 40),
                decoder: stack(1, 3, 36),
                activation: Activation::Gelu,
                order: NormOrder::Pre,
                final_norm: true,
                norm_eps: 1e-5,
                embed_scale: 1.0,
                positions: Positions::Learned { first: 2 },
                max_positions: 16,
                shared_embeddings: false,
                tied_logits: true,
                logits_bias: true,
            },
        ),
        (
            "post-norm, sinusoidal, SiLU, one table for all, no bias, odd widths",
            Spec {
                width: 18,
                source_vocab: 31,
                target_vocab: 31,
                encoder: stack(1, 3, 22),
                decoder: stack(2, 2, 25),
                activation: Activation::Silu,
                order: NormOrder::Post,
                final_norm: false,
                norm_eps: 1e-6,
                embed_scale: 18f32.sqrt(),
                positions: Positions::Sinusoidal,
                max_positions: 20,
                shared_embeddings: true,
                tied_logits: true,
                logits_bias: false,
            },
        ),
        (
            "pre-norm without final norms, learned positions, GELU by tanh, three tables",
            Spec {
                width: 15,
                source_vocab: 23,
                target_vocab: 41,
                encoder: stack(3, 5, 14),
                decoder: stack(2, 3, 17),
                activation: Activation::GeluTanh,
                order: NormOrder::Pre,
                final_norm: false,
                norm_eps: 1e-5,
                embed_scale: 2.0,
                positions: Positions::Learned { first: 0 },
                max_positions: 12,
                shared_embeddings: false,
                tied_logits: false,
                logits_bias: true,
            },
        ),
        (
            "post-norm with final norms, ReLU, shared embeddings and logits of their own",
            Spec {
                width: 32,
                source_vocab: 50,
                target_vocab: 50,
                encoder: stack(1, 2, 64),
                decoder: stack(3, 4, 48),
                activation: Activation::Relu,
                order: NormOrder::Post,
                final_norm: true,
                norm_eps: 1e-5,
                embed_scale: 1.0,
                positions: Positions::Sinusoidal,
                max_positions: 32,
                shared_embeddings: true,
                tied_logits: false,
                logits_bias: false,
            },
        ),
    ]
}

/// Makes weights: each goes to the file under its name and to the oracle.
struct Maker {
    random: Random,
    storage: DType,
    file: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Maker {
    /// Numbers around `middle`, as they are stored: matrices as `storage`, the rest as f32.
    fn values(&mut self, name: &str, shape: &[usize], middle: f64, spread: f64) -> Vec<f64> {
        let storage = match shape.len() == 2 && !name.contains("positions") {
            true => self.storage,
            false => DType::F32,
        };
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| round_to(storage.name(), middle + spread * self.random.float()))
            .collect();
        let floats = values.iter().map(|&x| x as f32).collect();
        self.file.insert(name.to_string(), (shape.to_vec(), floats));
        values
    }

    /// A dense layer that keeps the magnitude of what goes through.
    fn linear(&mut self, name: &str, n_in: usize, n_out: usize) -> reference::Linear {
        let spread = (3.0 / n_in as f64).sqrt();
        reference::Linear {
            n_in,
            weight: self.values(&format!("{name}.weight"), &[n_out, n_in], 0.0, spread),
            bias: Some(self.values(&format!("{name}.bias"), &[n_out], 0.0, 0.1)),
        }
    }

    fn norm(&mut self, name: &str, spec: &Spec) -> reference::Norm {
        let d = spec.width as usize;
        reference::Norm::Layer {
            weight: self.values(&format!("{name}.weight"), &[d], 1.0, 0.3),
            bias: self.values(&format!("{name}.bias"), &[d], 0.0, 0.1),
            eps: f64::from(spec.norm_eps),
        }
    }

    fn attention(&mut self, name: &str, d: usize, heads: u32) -> reference::AttentionWeights {
        let mut linear = |part: &str| self.linear(&format!("{name}.{part}_proj"), d, d);
        reference::AttentionWeights {
            heads: heads as usize,
            kv_heads: heads as usize,
            q: linear("q"),
            k: linear("k"),
            v: linear("v"),
            o: linear("out"),
        }
    }

    fn feed_forward(&mut self, layer: &str, spec: &Spec, stack: Stack) -> reference::FeedForward {
        let (d, ffn) = (spec.width as usize, stack.ffn as usize);
        reference::FeedForward {
            up: self.linear(&format!("{layer}.fc1"), d, ffn),
            activation: match spec.activation {
                Activation::Relu => reference::Activation::Relu,
                Activation::Gelu => reference::Activation::Gelu,
                Activation::GeluTanh => reference::Activation::GeluTanh,
                Activation::Silu => reference::Activation::Silu,
            },
            down: self.linear(&format!("{layer}.fc2"), ffn, d),
        }
    }

    fn positions(&mut self, spec: &Spec) -> Vec<f64> {
        let (n, d) = (spec.max_positions as usize, spec.width as usize);
        match spec.positions {
            Positions::Sinusoidal => reference::sinusoids(n, d),
            Positions::Learned { first } => {
                let first = first as usize;
                let name = "model.encoder.embed_positions.weight";
                let table = self.values(name, &[n + first, d], 0.0, 1.0);
                // The oracle has one table for both sides.
                let other = "model.decoder.embed_positions.weight";
                self.file.insert(other.into(), self.file[name].clone());
                table[first * d..].to_vec()
            }
        }
    }

    fn stack(&mut self, spec: &Spec) -> reference::Stack {
        let d = spec.width as usize;
        let pre = spec.order == NormOrder::Pre;
        let positions = self.positions(spec);
        let mut table = |name: &str, vocab: u32| {
            self.values(&format!("{name}.weight"), &[vocab as usize, d], 0.0, 1.0)
        };
        let source_embedding = match spec.shared_embeddings {
            true => table("model.shared", spec.source_vocab),
            false => table("model.encoder.embed_tokens", spec.source_vocab),
        };
        let target_embedding = match spec.shared_embeddings {
            true => None,
            false => Some(table("model.decoder.embed_tokens", spec.target_vocab)),
        };
        let output = match spec.tied_logits {
            true => None,
            false => Some(table("lm_head", spec.target_vocab)),
        };
        let vocab = spec.target_vocab as usize;
        let logits_bias = spec
            .logits_bias
            .then(|| self.values("final_logits_bias", &[1, vocab], 0.0, 0.5));
        let encoder = (0..spec.encoder.layers).map(|ix| {
            let layer = format!("model.encoder.layers.{ix}");
            reference::EncoderLayer {
                self_attention: self.attention(
                    &format!("{layer}.self_attn"),
                    d,
                    spec.encoder.heads,
                ),
                self_norm: self.norm(&format!("{layer}.self_attn_layer_norm"), spec),
                feed_forward: self.feed_forward(&layer, spec, spec.encoder),
                feed_forward_norm: self.norm(&format!("{layer}.final_layer_norm"), spec),
            }
        });
        let encoder = encoder.collect();
        let heads = spec.decoder.heads;
        let decoder = (0..spec.decoder.layers).map(|ix| {
            let layer = format!("model.decoder.layers.{ix}");
            reference::DecoderLayer {
                self_attention: self.attention(&format!("{layer}.self_attn"), d, heads),
                self_norm: self.norm(&format!("{layer}.self_attn_layer_norm"), spec),
                cross_attention: self.attention(&format!("{layer}.encoder_attn"), d, heads),
                cross_norm: self.norm(&format!("{layer}.encoder_attn_layer_norm"), spec),
                feed_forward: self.feed_forward(&layer, spec, spec.decoder),
                feed_forward_norm: self.norm(&format!("{layer}.final_layer_norm"), spec),
            }
        });
        let decoder = decoder.collect();
        let mut final_norm = |name| spec.final_norm.then(|| self.norm(name, spec));
        reference::Stack {
            d_model: d,
            norm_place: match pre {
                true => reference::NormPlace::Pre,
                false => reference::NormPlace::Post,
            },
            embedding_scale: f64::from(spec.embed_scale),
            positions,
            source_embedding,
            target_embedding,
            output,
            logits_bias,
            encoder_embedding_norm: None,
            decoder_embedding_norm: None,
            encoder,
            decoder,
            encoder_norm: final_norm("model.encoder.layer_norm"),
            decoder_norm: final_norm("model.decoder.layer_norm"),
        }
    }
}

/// A model on the device and the oracle of the same weights.
pub fn make(gpu: &Gpu, spec: &Spec, dtype: DType) -> (Model, reference::Stack) {
    let mut maker = Maker {
        random: Random::new(u64::from(spec.width)),
        storage: dtype,
        file: BTreeMap::new(),
    };
    let oracle = maker.stack(spec);
    let views = maker.file.iter().map(|(name, (shape, values))| {
        let bytes = bytemuck::cast_slice(values);
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let source = Source::Directory(dir.path().to_owned());
    let model = Model::load_spec(gpu, &source, spec, dtype, &mut |_, _| {}).unwrap();
    (model, oracle)
}
