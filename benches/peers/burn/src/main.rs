//! burn's attention on the tensors of a safetensors file, timed as `qkv attend --time N` is.
//!
//! `q` [B,H,Q,D], `k` and `v` [B,Hk,K,D], in f32. burn knows no grouped heads: the heads of K and V
//! are repeated on the host before anything is timed.

use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn_backend::ops::{AttentionModuleOptions, FloatTensorOps};
use burn_backend::{DType, TensorData, TensorMetadata};
use burn_cubecl::cubecl::device::WgpuDeviceKind;
use burn_cubecl::cubecl::profile::TimingMethod;
use burn_cubecl::kernel::attention::{AttentionStrategy, attention, flash_attention};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use clap::{Parser, ValueEnum};
use cubek::attention::forward::launch;
use half::f16;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
#[command(about = "burn's attention on the tensors of a safetensors file, timed")]
struct Options {
    /// q [B,H,Q,D], k and v [B,Hk,K,D] in f32
    input: PathBuf,
    /// Writes `out` [B,H,Q,D] in f32 here
    #[arg(short, long)]
    output: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = Storage::F32)]
    storage: Storage,
    /// The last query sees all keys
    #[arg(long)]
    causal: bool,
    /// Times a first call and N more by each clock
    #[arg(long, value_name = "N")]
    time: Option<u32>,
    #[arg(long, value_enum, default_value_t = Strategy::Unit)]
    strategy: Strategy,
}

#[derive(Clone, Copy, ValueEnum)]
enum Storage {
    F32,
    F16,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Strategy {
    /// The flash kernel without matrix instructions, or an error where burn refuses it
    Unit,
    /// Separate kernels with the scores in memory
    Fallback,
    /// What burn's tensors call: all of burn's kernels are timed in the first call, the fastest stays
    Autotune,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let file = std::fs::read(&options.input)?;
    let [q, k, v] = read(&SafeTensors::deserialize(&file)?, options.storage)?;

    let kind = WgpuDeviceKind::default();
    let device = CubeDevice::vulkan(kind.clone()).or_else(|_| CubeDevice::wgpu(kind))?;
    let client = device.client();
    let put = |data| CubeBackend::float_from_data(data, &device);
    let (q, k, v) = (put(q), put(k), put(v));
    pollster::block_on(client.sync()).map_err(|e| format!("{e:?}"))?;

    let call = || attend(&q, &k, &v, &options);
    // Waits for the device, and fails where the kernel could not be built or run.
    let wait = |out: &CubeTensor| {
        pollster::block_on(client.sync_buffers([&out.handle])).map_err(|e| format!("{e:?}"))
    };
    let timed = || -> Result<(f64, CubeTensor)> {
        let started = Instant::now();
        let out = call()?;
        wait(&out)?;
        Ok((started.elapsed().as_secs_f64() * 1e3, out))
    };

    let (first_ms, mut out) = timed()?;
    if let Some(n) = options.time {
        let mut wall_ms = Vec::new();
        for _ in 0..n {
            let ms;
            (ms, out) = timed()?;
            wall_ms.push(ms);
        }
        let mut device_ms = Vec::new();
        let clock = client.properties().timing_method;
        if clock == TimingMethod::Device {
            for _ in 0..n {
                let (last, took) = client
                    .profile(|| call().map_err(|e| e.to_string()), "attention")
                    .map_err(|e| format!("{e:?}"))?;
                let ticks = pollster::block_on(took.resolve()).ok_or("no timestamps")?;
                out = last?;
                wait(&out)?;
                device_ms.push(ticks.duration().as_secs_f64() * 1e3);
            }
        }
        let line = serde_json::json!({
            "device": client.properties().identity.name,
            "runtime": client.name(),
            "strategy": format!("{:?}", options.strategy).to_lowercase(),
            "clock": if device_ms.is_empty() { "host" } else { "device" },
            "first_ms": first_ms,
            "times_ms": if device_ms.is_empty() { &wall_ms } else { &device_ms },
            "wall_ms": wall_ms,
        });
        println!("{line}");
    }
    match &options.output {
        Some(path) => write(path, out),
        None => Ok(()),
    }
}

/// One call, not waited for.
fn attend(q: &CubeTensor, k: &CubeTensor, v: &CubeTensor, options: &Options) -> Result<CubeTensor> {
    let (q, k, v) = (q.clone(), k.clone(), v.clone());
    let module = AttentionModuleOptions {
        is_causal: options.causal,
        ..Default::default()
    };
    let out = match options.strategy {
        // Not by AttentionStrategy::FlashUnit, which takes the separate kernels where it is refused.
        Strategy::Unit => {
            let unit = launch::Strategy::Unit(launch::BlueprintStrategy::Inferred(()));
            flash_attention(q, k, v, None, None, module, unit)
        }
        Strategy::Fallback => attention(q, k, v, None, None, module, AttentionStrategy::Fallback),
        Strategy::Autotune => attention(q, k, v, None, None, module, AttentionStrategy::Autotune),
    };
    out.map_err(|e| format!("{:?}: {e:?}", options.strategy).into())
}

/// q, k and v as they go to the device, with as many heads each.
fn read(file: &SafeTensors, storage: Storage) -> Result<[TensorData; 3]> {
    let tensor = |name: &str| -> Result<([usize; 4], Vec<f32>)> {
        let view = file.tensor(name)?;
        if view.dtype() != Dtype::F32 {
            return Err(format!("{name} is {:?}; it must be F32", view.dtype()).into());
        }
        let shape = <[usize; 4]>::try_from(view.shape())
            .map_err(|_| format!("{name} has shape {:?}; it must have 4 axes", view.shape()))?;
        let (words, _) = view.data().as_chunks::<4>();
        Ok((
            shape,
            words.iter().map(|w| f32::from_le_bytes(*w)).collect(),
        ))
    };
    let (q, k, v) = (tensor("q")?, tensor("k")?, tensor("v")?);
    let heads = q.0[1];
    if k.0 != v.0 || k.0[1] == 0 || !heads.is_multiple_of(k.0[1]) {
        return Err(format!("q {:?}, k {:?}, v {:?} do not fit", q.0, k.0, v.0).into());
    }
    let data = |(shape, values): ([usize; 4], Vec<f32>)| {
        let [b, h, length, d] = shape;
        let repeats = heads / h;
        let values = values
            .chunks(length * d)
            .flat_map(|head| head.repeat(repeats));
        let shape = [b, heads, length, d];
        match storage {
            Storage::F32 => TensorData::new(values.collect::<Vec<f32>>(), shape),
            Storage::F16 => TensorData::new(values.map(f16::from_f32).collect(), shape),
        }
    };
    Ok([data(q), data(k), data(v)])
}

fn write(path: &Path, out: CubeTensor) -> Result<()> {
    let shape = out.shape().to_vec();
    let data =
        pollster::block_on(CubeBackend::float_into_data(out)).map_err(|e| format!("{e:?}"))?;
    let bytes: Vec<u8> = match data.dtype() {
        DType::F16 => data
            .as_slice::<f16>()?
            .iter()
            .flat_map(|x| x.to_f32().to_le_bytes())
            .collect(),
        _ => data
            .as_slice::<f32>()?
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
    };
    let view = TensorView::new(Dtype::F32, shape, &bytes)?;
    Ok(serialize_to_file(
        HashMap::from([("out", view)]),
        None,
        path,
    )?)
}
