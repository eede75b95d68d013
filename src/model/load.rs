//! From a directory to a model on the device.

use super::reader::{Reader, Tensors, binds};
use super::weights::Weights;
use super::{Columns, Model, Names, Positions, Source, Spec, Stack, marian};
use crate::gpu::{DType, Gpu, Tensor};
use crate::layers::{CrossAttention, DecoderLayer, EncoderLayer, FeedForward, SelfAttention};
use crate::ops::{Embedding, Linear, Matrix, Norm};
use crate::{Error, Result};

impl Model {
    /// Loads a model: `config.json` and `model.safetensors` of the source. `progress` hears of bytes
    /// taken and bytes in all. `dtype` stores weights and activations; softmax state and sums are f32.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is missing, damaged, or contradicts another one; [`Error::Refused`]
    /// for a model that no kernel can honour.
    pub fn load(
        gpu: &Gpu,
        source: &Source,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model> {
        let config_path = source.path().join("config.json");
        let config = source.json("config.json")?;
        let (spec, names) = match config.get("model_type").and_then(|value| value.as_str()) {
            Some("marian") => (marian::spec(&config_path, &config)?, &marian::NAMES),
            other => {
                return Err(Error::refused(
                    format!("model_type in {}", config_path.display()),
                    other.unwrap_or("absent"),
                    "marian is the encoder-decoder that is known",
                ));
            }
        };
        Model::load_as(gpu, source, &spec, names, dtype, progress)
    }

    /// Loads `model.safetensors` of the source as what `spec` says, under MarianMT's names: for stacks
    /// that no config describes.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_spec(
        gpu: &Gpu,
        source: &Source,
        spec: &Spec,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model> {
        Model::load_as(gpu, source, spec, &marian::NAMES, dtype, progress)
    }

    fn load_as(
        gpu: &Gpu,
        source: &Source,
        spec: &Spec,
        names: &Names,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model> {
        check_dtype(gpu, dtype)?;
        spec.check()?;
        let reader = Reader {
            gpu,
            dtype,
            tensors: Tensors::Safetensors(Weights::load(source)?),
            progress,
        };
        let loader = Loader {
            spec,
            names,
            reader,
        };
        loader.model()
    }
}

/// An error for a type of weights and activations that the device cannot compute with.
pub(super) fn check_dtype(gpu: &Gpu, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 => Ok(()),
        DType::F16 if gpu.caps().f16 => Ok(()),
        DType::F16 => Err(Error::refused(
            "dtype",
            "f16",
            "f32: this device has no f16 in shaders",
        )),
        other => Err(Error::refused("dtype", other.name(), "f32 or f16")),
    }
}

struct Loader<'a> {
    spec: &'a Spec,
    names: &'a Names,
    reader: Reader<'a>,
}

impl Loader<'_> {
    fn model(mut self) -> Result<Model> {
        let (spec, names) = (self.spec, self.names);
        let (source_vocab, target_vocab) = (spec.source_vocab, spec.target_vocab);

        let all_shared = spec.shared_embeddings && spec.tied_logits;
        // Where source and target are said to be shared, exports may still have one each.
        let fall_back = |reader: &Reader, name| spec.shared_embeddings && !reader.has(name);
        let own = |reader: &Reader, name| match all_shared || fall_back(reader, name) {
            true => names.shared_embedding,
            false => name,
        };
        let source_name = own(&self.reader, names.source_embedding);
        let target_name = own(&self.reader, names.target_embedding);
        let source_table = self.reader.table(source_name, source_vocab, spec.width)?;
        let target_table = match target_name == source_name {
            true => source_table.clone(),
            false => self.reader.table(target_name, target_vocab, spec.width)?,
        };
        let logits_table = match spec.tied_logits {
            true => target_table.clone(),
            false => self.reader.table(names.logits, target_vocab, spec.width)?,
        };
        // Copies of tied tensors and sinusoidal tables that some exports save all the same.
        for name in [
            names.shared_embedding,
            names.source_embedding,
            names.target_embedding,
            names.logits,
        ] {
            self.reader.skip(name);
        }
        let logits_bias = match spec.logits_bias {
            true => Some({
                let bias = self.reader.take(names.logits_bias, &[1, target_vocab])?;
                self.reader.padded(names.logits_bias, bias)?
            }),
            false => None,
        };
        let sines = match spec.positions {
            Positions::Sinusoidal => Some(self.sinusoidal()?),
            Positions::Learned { .. } => None,
        };
        let places = [names.source_positions, names.target_positions];
        let [source, target] = places.map(|name| self.positions(name, sines.as_ref()));
        let source = self.embedding(source_table, source_vocab, source?);
        let target = self.embedding(target_table, target_vocab, target?);

        let encoder = (0..spec.encoder.layers)
            .map(|ix| self.encoder_layer(&format!("{}.{ix}", names.encoder_layer)))
            .collect::<Result<_>>()?;
        let decoder = (0..spec.decoder.layers)
            .map(|ix| self.decoder_layer(&format!("{}.{ix}", names.decoder_layer)))
            .collect::<Result<_>>()?;
        let (encoder_norm, decoder_norm) = match spec.final_norm {
            true => (
                Some(self.norm(names.encoder_norm)?),
                Some(self.norm(names.decoder_norm)?),
            ),
            false => (None, None),
        };
        let (gpu, dtype) = (self.reader.gpu.clone(), self.reader.dtype);
        self.reader.finish()?;
        Ok(Model {
            gpu,
            spec: spec.clone(),
            dtype,
            source,
            encoder,
            encoder_norm,
            target,
            decoder,
            decoder_norm,
            logits: Linear {
                weight: logits_table,
                bias: logits_bias,
                n: target_vocab,
            },
        })
    }

    fn embedding(&self, table: Matrix, vocab: u32, positions: Tensor) -> Embedding {
        Embedding {
            table,
            vocab,
            positions: Some(positions),
            first_position: match self.spec.positions {
                Positions::Sinusoidal => 0,
                Positions::Learned { first } => first,
            },
            scale: self.spec.embed_scale,
        }
    }

    /// A stack's table of positions: its own, or the sines that both have.
    fn positions(&mut self, name: &str, sines: Option<&Tensor>) -> Result<Tensor> {
        if let Some(sines) = sines {
            self.reader.skip(name);
            return Ok(sines.clone());
        }
        let rows = self.spec.max_positions;
        let rows = match self.spec.positions {
            Positions::Sinusoidal => rows,
            Positions::Learned { first } => rows.saturating_add(first),
        };
        let (gpu, shape) = (self.reader.gpu, [rows, self.spec.width]);
        binds(gpu, name, DType::F32.bytes(&shape))?;
        let values = self.reader.take(name, &shape)?;
        gpu.upload_floats("positions", DType::F32, &shape, &values)
    }

    fn sinusoidal(&self) -> Result<Tensor> {
        let (rows, d) = (self.spec.max_positions, self.spec.width);
        let (gpu, shape) = (self.reader.gpu, [rows, d]);
        let what = format!("a table of {rows} positions");
        binds(gpu, &what, DType::F32.bytes(&shape))?;
        gpu.upload_floats("positions", DType::F32, &shape, &sinusoidal(rows, d))
    }

    /// Dense layers under one prefix as one, side by side.
    fn linear(&mut self, prefix: &str, names: &[&str], n: u32, k: u32) -> Result<Linear> {
        let layers = names.iter().map(|name| (format!("{prefix}.{name}"), n));
        self.reader
            .linear(&layers.collect::<Vec<_>>(), k, Columns::SideBySide, true)
    }

    fn norm(&mut self, name: &str) -> Result<Norm> {
        let d = self.spec.width;
        Ok(Norm {
            gamma: self.reader.vector(&format!("{name}.weight"), d)?,
            beta: Some(self.reader.vector(&format!("{name}.bias"), d)?),
            eps: self.spec.norm_eps,
        })
    }

    fn self_attention(&mut self, layer: &str) -> Result<SelfAttention> {
        let (names, d) = (self.names, self.spec.width);
        let prefix = format!("{layer}.{}", names.self_attention);
        let [q, k, v, out] = names.projections;
        Ok(SelfAttention {
            qkv: self.linear(&prefix, &[q, k, v], d, d)?,
            out: self.linear(&prefix, &[out], d, d)?,
            norm: self.norm(&format!("{layer}.{}", names.self_norm))?,
        })
    }

    fn cross_attention(&mut self, layer: &str) -> Result<CrossAttention> {
        let (names, d) = (self.names, self.spec.width);
        let prefix = format!("{layer}.{}", names.cross_attention);
        let [q, k, v, out] = names.projections;
        Ok(CrossAttention {
            q: self.linear(&prefix, &[q], d, d)?,
            kv: self.linear(&prefix, &[k, v], d, d)?,
            out: self.linear(&prefix, &[out], d, d)?,
            norm: self.norm(&format!("{layer}.{}", names.cross_norm))?,
        })
    }

    fn feed_forward(&mut self, layer: &str, stack: Stack) -> Result<FeedForward> {
        let (names, d) = (self.names, self.spec.width);
        Ok(FeedForward {
            up: self.linear(layer, &[names.up], stack.ffn, d)?,
            down: self.linear(layer, &[names.down], d, stack.ffn)?,
            activation: self.spec.activation,
            norm: self.norm(&format!("{layer}.{}", names.feed_forward_norm))?,
        })
    }

    fn encoder_layer(&mut self, layer: &str) -> Result<EncoderLayer> {
        Ok(EncoderLayer {
            attention: self.self_attention(layer)?,
            feed_forward: self.feed_forward(layer, self.spec.encoder)?,
        })
    }

    fn decoder_layer(&mut self, layer: &str) -> Result<DecoderLayer> {
        Ok(DecoderLayer {
            attention: self.self_attention(layer)?,
            cross: self.cross_attention(layer)?,
            feed_forward: self.feed_forward(layer, self.spec.decoder)?,
        })
    }
}

/// Sines in the first half of a row, cosines in the second: column i of either is the angle
/// p / 10000^(2 i / d), as Marian lays them out. `[P, d]`
fn sinusoidal(positions: u32, d: u32) -> Vec<f32> {
    let sines = d.div_ceil(2);
    (0..positions)
        .flat_map(|p| {
            (0..d).map(move |column| {
                let (i, cosine) = match column < sines {
                    true => (column, false),
                    false => (column - sines, true),
                };
                let angle = p as f64 / 10000f64.powf(2.0 * i as f64 / d as f64);
                (if cosine { angle.cos() } else { angle.sin() }) as f32
            })
        })
        .collect()
}
