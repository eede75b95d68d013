//! Matrix products by storage of the weights: time, bytes of weights read a second, and the ratio to f32.
//!
//! ```text
//! cargo bench --bench matrix               every shape
//! cargo bench --bench matrix -- 1x576      those whose line has all of these words
//! ```
//!
//! A recording goes over as many copies of a matrix as fill a cache several times, as a step of decoding
//! goes over layers; the best of several runs counts. tests/matrices.rs holds the answers to the oracle.

use std::time::Duration;

use qkv::gpu::{DType, Gpu, Recorder};
use qkv::ops::{self, Epilogue, Linear, Matrix, Storage};

/// M, K, N: a row's projections of a small decoder and its logits, then batches and prompts.
const SHAPES: [[u32; 3]; 10] = [
    [1, 576, 576],
    [1, 576, 1536],
    [1, 1536, 576],
    [1, 576, 49152],
    [4, 576, 1536],
    [8, 576, 1536],
    [32, 576, 1536],
    [8, 576, 49152],
    [32, 576, 49152],
    [256, 576, 1536],
];

/// More than any cache holds.
const BYTES: u64 = 96 << 20;

fn matrix(gpu: &Gpu, storage: Storage, k: u32, n: u32) -> qkv::Result<Matrix> {
    let block: Vec<u8> = match storage {
        Storage::F32 | Storage::F16 => {
            let dtype = match storage {
                Storage::F32 => DType::F32,
                _ => DType::F16,
            };
            let values: Vec<f32> = (0..k * n)
                .map(|ix| (ix % 17) as f32 * 0.01 - 0.08)
                .collect();
            return Matrix::dense(gpu.upload_floats("w", dtype, &[k, n], &values)?);
        }
        Storage::Q8_0 => [&[0, 0x10][..], &[0x85; 32]].concat(),
        Storage::Q4_0 => [&[0, 0x10][..], &[0x85; 16]].concat(),
        Storage::Q4_1 => [&[0, 0x10, 0, 0x90][..], &[0x85; 16]].concat(),
    };
    let column = block.repeat(k as usize / 32);
    Matrix::blocks(gpu, "w", storage, k, &vec![&column[..]; n as usize])
}

fn time(gpu: &Gpu, storage: Storage, [m, k, n]: [u32; 3]) -> qkv::Result<(Duration, u64)> {
    let first = matrix(gpu, storage, k, n)?;
    let bytes = first.bytes();
    let copies = match m {
        1..=4 => BYTES.div_ceil(bytes).min(64),
        _ => 4,
    };
    let mut linears = Vec::new();
    for copy in 0..copies {
        let weight = match copy {
            0 => first.clone(),
            _ => matrix(gpu, storage, k, n)?,
        };
        let bias = None;
        linears.push(Linear { weight, bias, n });
    }
    let x = vec![0.5; (m * k) as usize];
    let x = gpu.upload_floats("x", DType::F32, &[m, k], &x)?;
    let y = gpu.empty("y", DType::F32, &[m, n])?;
    let mut recorder = Recorder::new(gpu);
    for linear in &linears {
        ops::matmul(&mut recorder, &x, linear, &y, Epilogue::default())?;
    }
    let recording = recorder.finish()?;
    let mut best = Duration::MAX;
    for _ in 0..12 {
        best = best.min(gpu.time(&recording)?);
    }
    Ok((best / copies as u32, bytes))
}

fn main() -> qkv::Result<()> {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let gpu = Gpu::new()?.untuned();
    println!("{}", gpu.caps().name);
    println!("MxKxN, storage: time, of f32's; weights read a second");
    for shape in SHAPES {
        let [m, k, n] = shape;
        let mut plain = None;
        for storage in [
            Storage::F32,
            Storage::F16,
            Storage::Q8_0,
            Storage::Q4_0,
            Storage::Q4_1,
        ] {
            let name = format!("{m}x{k}x{n} {storage:?}");
            if !words.iter().all(|word| name.contains(word.as_str())) {
                continue;
            }
            if storage == Storage::F16 && !gpu.caps().f16 {
                continue;
            }
            let (took, bytes) = time(&gpu, storage, shape)?;
            let seconds = took.as_secs_f64();
            let ratio = seconds / *plain.get_or_insert(seconds);
            let rate = bytes as f64 / seconds * 1e-9;
            println!(
                "{name:24} {:9.1} µs {ratio:6.2} {rate:6.2} GB/s",
                seconds * 1e6
            );
        }
    }
    Ok(())
}
