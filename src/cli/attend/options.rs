//! What is asked on the command line.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use qkv::attention::{self, Align, MAX_LEN, Route, Stage, T5};
use qkv::gpu::{DType, Gpu};
use qkv::{Error, Result};

use super::input::Layout;

#[derive(Args)]
pub struct Options {
    /// Floats (f32, f16, bf16, f64): `q` [B,H,Q,D], `k` [B,Hk,K,D], `v` [B,Hk,K,Dv]. If wanted: `bias`
    /// (floats) and `mask` (bool or u8, true attends), which broadcast to [B,H,Q,K]; `kv_len`, `q_offset`
    /// and `prefix_len` (integers) [B]; `sinks` and `alibi` (floats) [H]; `t5` (floats) [buckets,H]; `cu_q`
    /// and `cu_k` (integers) [B+1], with which q is [H,T,D], and k and v are [Hk,T,D]
    #[arg(value_name = "IN.safetensors", verbatim_doc_comment)]
    pub input: PathBuf,
    /// f32: `out` [B,H,Q,Dv] and, as asked for, `lse` [B,H,Q] and `weights` [B,H,Q,K]; with `cu_q`
    /// [H,T,Dv], [H,T] and [H,T,K], zeros where a row is in no sequence
    #[arg(short, long, value_name = "OUT.safetensors", verbatim_doc_comment)]
    #[arg(required_unless_present_any = ["verify", "explain", "time"])]
    pub output: Option<PathBuf>,

    /// The order of the axes of q, k, v and out: batch, heads, length, depth; `blhd` is [B,Q,H,D]
    #[arg(long, value_enum, default_value = "bhld")]
    pub layout: Layout,
    /// Queries see keys up to their own position
    #[arg(long)]
    causal: bool,
    /// Where the queries stand: the last one at the last key, or the first one at the first key. A tensor
    /// `q_offset` takes its place
    #[arg(long, value_enum, default_value = "bottom-right")]
    align: AlignName,
    /// How many keys before and after its own position a query sees; -1 is without bound
    #[arg(long, value_name = "LEFT,RIGHT", allow_hyphen_values = true)]
    window: Option<String>,
    /// The scores' factor; 1 / sqrt(D) if not given
    #[arg(long, allow_hyphen_values = true)]
    scale: Option<f32>,
    /// Scores become C tanh(score / C)
    #[arg(long, value_name = "C", allow_hyphen_values = true)]
    softcap: Option<f32>,
    /// The distance from which on all keys share the last bucket of `t5`; 128 if not given
    #[arg(long, value_name = "N")]
    t5_distance: Option<u32>,
    /// Keys after the query have no buckets of their own in `t5`, as in decoders
    #[arg(long)]
    t5_causal: bool,
    /// WGSL: fn score_mod(score: f32, b: u32, h: u32, q: u32, k: u32) -> f32. Other tensors of IN (f32,
    /// i32, u32; at most two) are arrays of their names in it
    #[arg(long, value_name = "FILE.wgsl")]
    pub score_mod: Option<PathBuf>,
    /// WGSL: fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool; true attends
    #[arg(long, value_name = "FILE.wgsl")]
    pub mask_mod: Option<PathBuf>,

    /// How q and out are stored on the device, and k and v unless --kv-storage says otherwise
    #[arg(long, value_enum, default_value = "f32")]
    storage: Storage,
    /// How k and v are stored on the device
    #[arg(long, value_enum)]
    kv_storage: Option<KvStorage>,
    /// Also `lse`, the natural logarithm of each row's denominator
    #[arg(long)]
    pub lse: bool,
    /// Also `weights`: the scaled products, these after the softcap, after biases and masks, or the weights
    #[arg(long, value_enum, value_name = "STAGE")]
    pub weights: Option<StageName>,

    /// The way to compute it
    #[arg(long, value_enum, default_value = "auto")]
    route: RouteName,
    /// Parts of the key axis on the route `decode`
    #[arg(long, value_name = "N")]
    splits: Option<u32>,
    /// As on a device without subgroup operations
    #[arg(long)]
    no_subgroups: bool,
    /// As on a device without f16
    #[arg(long)]
    no_f16: bool,
    /// The device's own limits and features, or what every WebGPU implementation grants
    #[arg(long, value_enum, default_value = "device")]
    limits: Limits,
    /// Weights times values in f16 too, on the route `prefill`; with --storage f16
    #[arg(long)]
    f16_math: bool,
    /// What a row's bits do not depend on
    #[arg(long, value_enum)]
    deterministic: Option<Deterministic>,

    /// Compare every row with an oracle in f64; exit code 1 where one is wrong
    #[arg(long)]
    pub verify: bool,
    /// Print what runs: route, kernels, workgroups, splits, scratch
    #[arg(long)]
    pub explain: bool,
    /// Run N more times and print one line of JSON: the first run's ms, the others' ms on the device, and
    /// the host's ms to record, encode and submit one
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub time: Option<u32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum AlignName {
    TopLeft,
    BottomRight,
}

#[derive(Clone, Copy, ValueEnum)]
enum Storage {
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum KvStorage {
    F32,
    F16,
    Bf16,
    /// Blocks of 32 columns with a scale
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum StageName {
    Raw,
    Softcap,
    Biased,
    Softmax,
}

#[derive(Clone, Copy, ValueEnum)]
enum RouteName {
    Auto,
    ThreePass,
    Prefill,
    Decode,
}

#[derive(Clone, Copy, ValueEnum)]
enum Limits {
    Device,
    Default,
}

#[derive(Clone, Copy, ValueEnum)]
enum Deterministic {
    /// The rest of the batch
    Batch,
}

impl Storage {
    fn dtype(self) -> DType {
        match self {
            Storage::F32 => DType::F32,
            Storage::F16 => DType::F16,
            Storage::Bf16 => DType::BF16,
        }
    }
}

impl KvStorage {
    fn dtype(self) -> DType {
        match self {
            KvStorage::F32 => DType::F32,
            KvStorage::F16 => DType::F16,
            KvStorage::Bf16 => DType::BF16,
            KvStorage::Q8_0 => DType::Q8_0,
            KvStorage::Q4_0 => DType::Q4_0,
        }
    }
}

impl Options {
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    pub fn kv_dtype(&self) -> DType {
        let kv = self.kv_storage.map(KvStorage::dtype);
        kv.unwrap_or(self.storage.dtype())
    }

    pub fn has_functions(&self) -> bool {
        self.score_mod.is_some() || self.mask_mod.is_some()
    }

    /// What is asked of the operator; `has_t5` is whether IN has T5's table.
    pub fn operator(&self, has_t5: bool) -> Result<attention::Options> {
        if !has_t5 && let Some(distance) = self.t5_distance {
            let bound = "it goes with a tensor t5, which IN lacks";
            return Err(Error::refused("--t5-distance", distance, bound));
        }
        if !has_t5 && self.t5_causal {
            let bound = "it goes with a tensor t5, which IN lacks";
            return Err(Error::refused("--t5-causal", "given", bound));
        }
        Ok(attention::Options {
            scale: self.scale,
            softcap: self.softcap,
            causal: self.causal,
            window: self.window.as_deref().map_or(Ok([None; 2]), window)?,
            align: match self.align {
                AlignName::TopLeft => Align::TopLeft,
                AlignName::BottomRight => Align::BottomRight,
            },
            t5: has_t5.then_some(T5 {
                bidirectional: !self.t5_causal,
                max_distance: self.t5_distance.unwrap_or(128),
            }),
            score_mod: self.score_mod.as_deref().map(text).transpose()?,
            mask_mod: self.mask_mod.as_deref().map(text).transpose()?,
            stage: match self.weights {
                Some(StageName::Raw) => Stage::Raw,
                Some(StageName::Softcap) => Stage::Softcap,
                Some(StageName::Biased) => Stage::Biased,
                Some(StageName::Softmax) | None => Stage::Softmax,
            },
            f16_math: self.f16_math,
            batch_invariant: matches!(self.deterministic, Some(Deterministic::Batch)),
            route: match self.route {
                RouteName::Auto => None,
                RouteName::ThreePass => Some(Route::ThreePass),
                RouteName::Prefill => Some(Route::Prefill),
                RouteName::Decode => Some(Route::Decode),
            },
            splits: self.splits,
        })
    }

    /// The device with the powers that are left to it.
    pub fn narrowed(&self, gpu: Gpu) -> Gpu {
        let mut caps = gpu.caps().clone();
        if let Limits::Default = self.limits {
            caps = caps.browser();
        }
        if self.no_subgroups {
            caps = caps.without_subgroups();
        }
        if self.no_f16 {
            caps = caps.without_f16();
        }
        match caps == *gpu.caps() {
            true => gpu,
            false => gpu.narrowed(caps),
        }
    }
}

/// `LEFT,RIGHT`.
fn window(text: &str) -> Result<[Option<u32>; 2]> {
    let side = |text: &str| match text.trim().parse::<i64>() {
        Ok(-1) => Some(None),
        Ok(n) if (0..=i64::from(MAX_LEN)).contains(&n) => Some(Some(n as u32)),
        _ => None,
    };
    let sides = text.split_once(',');
    let sides = sides.and_then(|(left, right)| Some([side(left)?, side(right)?]));
    sides.ok_or_else(|| {
        let bound = format!("LEFT,RIGHT, each -1, for no bound, or from 0 to {MAX_LEN}");
        Error::refused("--window", text, bound)
    })
}

fn text(path: &Path) -> Result<Arc<str>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    Ok(text.into())
}
