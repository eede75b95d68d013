//! burn's attention as a peer of `qkv bench --peers=burn`, whose src/cli/bench/peers.rs says what lines of JSON
//! are spoken. Times are by its own profiler's timestamps, or the host's clock where there are none.
//!
//! burn knows no grouped heads: the heads of K and V are repeated on the host before anything is timed.

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
use serde::Deserialize;
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
#[command(about = "burn's attention, for `qkv bench --peers=burn`")]
struct Options {
    /// Its kernel
    #[arg(long, value_enum, env = "BURN_STRATEGY", default_value_t = Strategy::Unit)]
    strategy: Strategy,
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

/// What is to be computed.
#[derive(Deserialize)]
struct Case {
    input: PathBuf,
    output: PathBuf,
    /// The last query sees all keys.
    causal: bool,
    storage: Storage,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Storage {
    F32,
    F16,
}

fn main() {
    let options = Options::parse();
    if let Err(why) = speak(options.strategy) {
        println!("{}", json!({ "failed": why.to_string() }));
    }
}

fn speak(strategy: Strategy) -> Result<()> {
    let mut asked = std::io::stdin().lines();
    println!("{}", json!({ "missing": [] }));
    let Some(line) = asked.next() else {
        return Ok(());
    };
    let case: Case = serde_json::from_str(&line?)?;
    let file = std::fs::read(&case.input)?;
    let [q, k, v] = read(&SafeTensors::deserialize(&file)?, case.storage)?;

    let kind = WgpuDeviceKind::default();
    let device = CubeDevice::vulkan(kind.clone()).or_else(|_| CubeDevice::wgpu(kind))?;
    let client = device.client();
    let put = |data| CubeBackend::float_from_data(data, &device);
    let (q, k, v) = (put(q), put(k), put(v));
    pollster::block_on(client.sync()).map_err(|e| format!("{e:?}"))?;

    let call = || attend(&q, &k, &v, case.causal, strategy);
    // Waits for the device, and fails where the kernel could not be built or run.
    let wait = |out: &CubeTensor| {
        pollster::block_on(client.sync_buffers([&out.handle])).map_err(|e| format!("{e:?}"))
    };
    let by_host = || -> Result<(f64, CubeTensor)> {
        let started = Instant::now();
        let out = call()?;
        wait(&out)?;
        Ok((started.elapsed().as_secs_f64() * 1e3, out))
    };
    let by_device = || -> Result<(f64, CubeTensor)> {
        let (out, took) = client
            .profile(|| call().map_err(|e| e.to_string()), "attention")
            .map_err(|e| format!("{e:?}"))?;
        let ticks = pollster::block_on(took.resolve()).ok_or("no timestamps")?;
        let out = out?;
        wait(&out)?;
        Ok((ticks.duration().as_secs_f64() * 1e3, out))
    };

    let (first_ms, mut out) = by_host()?;
    let about = json!({
        "version": "0.22.1",
        "device": client.properties().identity.name,
        "runtime": client.name(),
        "strategy": format!("{strategy:?}").to_lowercase(),
    });
    println!("{}", json!({ "first_ms": first_ms, "about": about }));

    let has_clock = client.properties().timing_method == TimingMethod::Device;
    let mut times = Vec::new();
    for line in asked {
        if serde_json::from_str::<Value>(&line?)? != json!("call") {
            write(&case.output, out)?;
            let clock = if has_clock { "device" } else { "host" };
            println!("{}", json!({ "clock": clock, "times_ms": times }));
            break;
        }
        let ms;
        (ms, out) = if has_clock { by_device()? } else { by_host()? };
        times.push(ms);
        println!("{{}}");
    }
    Ok(())
}

/// One call, not waited for.
fn attend(
    q: &CubeTensor,
    k: &CubeTensor,
    v: &CubeTensor,
    is_causal: bool,
    strategy: Strategy,
) -> Result<CubeTensor> {
    let (q, k, v) = (q.clone(), k.clone(), v.clone());
    let module = AttentionModuleOptions {
        is_causal,
        ..Default::default()
    };
    let out = match strategy {
        // Not by AttentionStrategy::FlashUnit, which takes the separate kernels where it is refused.
        Strategy::Unit => {
            let unit = launch::Strategy::Unit(launch::BlueprintStrategy::Inferred(()));
            flash_attention(q, k, v, None, None, module, unit)
        }
        Strategy::Fallback => attention(q, k, v, None, None, module, AttentionStrategy::Fallback),
        Strategy::Autotune => attention(q, k, v, None, None, module, AttentionStrategy::Autotune),
    };
    out.map_err(|e| format!("{strategy:?}: {e:?}").into())
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
