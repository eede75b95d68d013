//! `qkv forward`: token ids in, logits, states and attention weights out, as safetensors.

use std::path::{Path, PathBuf};

use clap::Args;
use qkv::gpu::Tensor;
use qkv::model::{AnyModel, Model, Padded};
use qkv::{Error, Result};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use super::{Device, Floats, ModelOptions, load, save};

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Integers: `input_ids` [B,S], for an encoder-decoder `decoder_input_ids` [B,T], and `attention_mask`
    /// [B,S] if some rows of `input_ids` are padded, at their end
    #[arg(value_name = "IN.safetensors")]
    input: PathBuf,
    /// f32: `logits` [B,T,V] and, of an encoder-decoder, `encoder_states` [B,S,d]
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// Also `attentions.L`, or `encoder_attentions.L`, `decoder_attentions.L` and `cross_attentions.L`,
    /// [B,H,Q,K]
    #[arg(long)]
    attentions: bool,
}

pub fn run(options: &Options, device: &Device) -> Result<()> {
    let input = Input::load(&options.input)?;
    let sources = input.sources()?;
    let gpu = device.open()?;
    let (source, dtype) = (options.model.source()?, options.model.dtype());
    let model = load(&gpu, |gpu, progress| {
        AnyModel::load(gpu, &source, dtype, progress)
    })?;
    let tensors = match model {
        AnyModel::Causal(model) => {
            let forward = model.forward(&sources, options.attentions)?;
            let taps = numbered("attentions", forward.attentions);
            taps.chain([("logits".into(), forward.logits)]).collect()
        }
        AnyModel::EncoderDecoder(model) => translate(&model, &input, &sources, options.attentions)?,
    };
    let tensors = tensors.into_iter().map(|(name, tensor): (String, Tensor)| {
        Ok(Floats {
            name,
            shape: tensor.shape().to_vec(),
            values: gpu.read_floats(&tensor)?,
        })
    });
    save(&options.output, tensors.collect::<Result<_>>()?)?;
    gpu.save_pipelines();
    Ok(())
}

/// Layers' tensors by name.
fn numbered(kind: &str, taps: Vec<Tensor>) -> impl Iterator<Item = (String, Tensor)> {
    let taps = taps.into_iter().enumerate();
    taps.map(move |(ix, tap)| (format!("{kind}.{ix}"), tap))
}

fn translate(
    model: &Model,
    input: &Input,
    sources: &Padded,
    attentions: bool,
) -> Result<Vec<(String, Tensor)>> {
    let targets = input.targets()?;
    let memory = model.encode(sources, attentions)?;
    let forward = model.forward(&memory, &targets, attentions)?;
    let mut tensors = vec![
        ("logits".to_string(), forward.logits),
        ("encoder_states".to_string(), memory.states),
    ];
    tensors.extend(numbered("encoder_attentions", memory.attentions));
    tensors.extend(numbered("decoder_attentions", forward.decoder_attentions));
    tensors.extend(numbered("cross_attentions", forward.cross_attentions));
    Ok(tensors)
}

struct Input {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Input {
    fn load(path: &Path) -> Result<Self> {
        Ok(Input {
            bytes: std::fs::read(path).map_err(|e| Error::file(path, e))?,
            path: path.to_owned(),
        })
    }

    /// An integer matrix, where it is there.
    fn integers(&self, name: &str) -> Result<Option<(usize, Vec<u32>)>> {
        let bad = |what: String| Error::file(&self.path, what);
        let file = SafeTensors::deserialize(&self.bytes)
            .map_err(|e| bad(format!("not a whole safetensors file: {e}")))?;
        let Ok(view) = file.tensor(name) else {
            return Ok(None);
        };
        let &[_, columns] = view.shape() else {
            return Err(bad(format!(
                "{name} has the shape {:?}; it must be a matrix",
                view.shape()
            )));
        };
        let data = view.data();
        let wide: Vec<i64> = match view.dtype() {
            Dtype::I64 | Dtype::U64 => data
                .as_chunks::<8>()
                .0
                .iter()
                .map(|&b| i64::from_le_bytes(b))
                .collect(),
            Dtype::I32 => data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| i32::from_le_bytes(b) as i64)
                .collect(),
            Dtype::U32 => data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| u32::from_le_bytes(b) as i64)
                .collect(),
            Dtype::U8 | Dtype::BOOL => data.iter().map(|&b| b as i64).collect(),
            other => {
                return Err(bad(format!(
                    "{name} is {other:?}; i64, i32, u64, u32, u8 and bool are read"
                )));
            }
        };
        let narrow: std::result::Result<Vec<u32>, _> =
            wide.iter().map(|&id| u32::try_from(id)).collect();
        let ids =
            narrow.map_err(|_| bad(format!("{name} holds an id that is negative or too large")))?;
        Ok(Some((columns, ids)))
    }

    fn must(&self, name: &str) -> Result<(usize, Vec<u32>)> {
        let found = self.integers(name)?;
        found.ok_or_else(|| Error::file(&self.path, format_args!("it has no tensor {name}")))
    }

    fn sources(&self) -> Result<Padded> {
        let (len, ids) = self.must("input_ids")?;
        let rows = ids.len() / len.max(1);
        let lengths = match self.integers("attention_mask")? {
            None => vec![len as u32; rows],
            Some((columns, mask)) => {
                if columns != len || mask.len() != ids.len() {
                    return Err(Error::file(
                        &self.path,
                        "attention_mask has not the shape of input_ids",
                    ));
                }
                mask.chunks(len.max(1))
                    .enumerate()
                    .map(|(ix, row)| self.length(ix, row))
                    .collect::<Result<_>>()?
            }
        };
        Ok(Padded {
            ids,
            lengths,
            len: len as u32,
        })
    }

    /// The number of leading ones in a row of a mask that has nothing behind them.
    fn length(&self, ix: usize, row: &[u32]) -> Result<u32> {
        let length = row.iter().take_while(|&&bit| bit == 1).count();
        if row[length..].iter().any(|&bit| bit != 0) {
            return Err(Error::refused(
                format!("attention_mask row {ix} in {}", self.path.display()),
                format_args!("{row:?}"),
                "ones, then zeros: sources are padded at their end",
            ));
        }
        Ok(length as u32)
    }

    fn targets(&self) -> Result<Padded> {
        let (len, ids) = self.must("decoder_input_ids")?;
        Ok(Padded {
            lengths: vec![len as u32; ids.len() / len.max(1)],
            ids,
            len: len as u32,
        })
    }
}
