//! How good the choices are: for each shape every candidate is timed in turns, at full size, beside what
//! [`qkv::tune`] chooses and what the table by capabilities takes.
//!
//! ```text
//! cargo bench --bench tuner                    every shape, f32 and f16
//! cargo bench --bench tuner -- 1,8,8,1 f32     those whose line has all of these words
//! ```
//!
//! A ratio is the median of those of single rounds, in each of which every candidate that is not hopeless ran once;
//! it tells how much slower the choice is than the fastest candidate, by the median of times. What drifts from round
//! to round is in both. `first` counts the pipelines that a shape's first use makes without tuning.

use std::time::Instant;

use qkv::attention::{Candidate, Options, Problem, Tensors, View, record, record_as};
use qkv::gpu::{Gpu, Recorder, Recording, Tensor};
use qkv::tune::{self, Shape, default_shapes};

struct Inputs {
    tensors: [Tensor; 4],
    options: Options,
}

impl Inputs {
    fn new(gpu: &Gpu, shape: &Shape) -> qkv::Result<Inputs> {
        let make = |name, extents: [u32; 4]| {
            let n: u32 = extents.iter().product();
            let values: Vec<f32> = (0..n)
                .map(|x| (x.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
                .collect();
            gpu.upload_floats(name, shape.dtype, &extents, &values)
        };
        let rows = [shape.batch, shape.heads, shape.q_len];
        let keys = [shape.batch, shape.kv_heads, shape.k_len];
        let with = |[b, h, l]: [u32; 3], d| [b, h, l, d];
        Ok(Inputs {
            tensors: [
                make("q", with(rows, shape.head_dim))?,
                make("k", with(keys, shape.head_dim))?,
                make("v", with(keys, shape.value_dim))?,
                make("out", with(rows, shape.value_dim))?,
            ],
            options: Options {
                causal: shape.causal,
                ..Options::default()
            },
        })
    }

    fn views(&self) -> qkv::Result<Tensors<'_>> {
        let [q, k, v, out] = &self.tensors;
        Ok(Tensors::new(
            View::bhld(q)?,
            View::bhld(k)?,
            View::bhld(v)?,
            View::bhld(out)?,
        ))
    }
}

struct Entry {
    candidate: Candidate,
    recording: Recording,
    seconds: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Every candidate, timed in turns; those three times as slow as another leave after two rounds, but for those
/// that are asked about.
fn time_all(
    gpu: &Gpu,
    inputs: &Inputs,
    asked: [Candidate; 2],
    seconds: f64,
) -> qkv::Result<Vec<Entry>> {
    let problem = Problem::new(&inputs.views()?, &inputs.options)?;
    let mut candidates = Candidate::kernels(&problem, gpu.caps());
    for kernel in candidates.clone() {
        candidates.extend(kernel.other_splits(&problem, gpu.caps()));
    }
    candidates.extend(asked);
    let mut entries: Vec<Entry> = Vec::new();
    for candidate in candidates {
        if entries.iter().any(|entry| entry.candidate == candidate) {
            continue;
        }
        let mut recorder = Recorder::new(gpu);
        record_as(&mut recorder, &inputs.views()?, &inputs.options, candidate)?;
        let recording = recorder.finish()?;
        gpu.run(&recording)?;
        entries.push(Entry {
            candidate,
            recording,
            seconds: Vec::new(),
        });
    }
    let started = Instant::now();
    for round in 1..=300 {
        for entry in &mut entries {
            entry
                .seconds
                .push(gpu.time(&entry.recording)?.as_secs_f64());
        }
        entries.reverse();
        let least = |entry: &Entry| entry.seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let slack = if round < 6 { 3.0 } else { 1.5 };
        let bound = slack * entries.iter().map(least).fold(f64::INFINITY, f64::min);
        if round >= 2 {
            entries.retain(|entry| asked.contains(&entry.candidate) || least(entry) <= bound);
        }
        if round >= 9 && started.elapsed().as_secs_f64() > seconds {
            break;
        }
    }
    entries.sort_by(|a, b| median(&a.seconds).total_cmp(&median(&b.seconds)));
    Ok(entries)
}

fn main() -> qkv::Result<()> {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let seconds = std::env::var("QKV_BENCH_SECONDS").ok();
    let seconds: f64 = seconds.and_then(|n| n.parse().ok()).unwrap_or(10.0);
    // In memory alone: a narrowed device saves nothing.
    let gpu = Gpu::new()?.untuned();
    let gpu = gpu.narrowed(gpu.caps().clone());
    println!("{}", gpu.caps().name);
    println!(
        "shape                             first  took s  tuned %  table %   best ms  best, tuned, table"
    );
    let (mut worst_tuned, mut worst_table) = (0f64, 0f64);
    for shape in default_shapes(gpu.caps()) {
        let name = shape.to_string();
        if !words.iter().all(|word| name.contains(word.as_str())) {
            continue;
        }
        let inputs = Inputs::new(&gpu, &shape)?;
        let before = gpu.counters().pipelines;
        let mut recorder = Recorder::new(&gpu);
        record(&mut recorder, &inputs.views()?, &inputs.options)?;
        recorder.finish()?;
        let first = gpu.counters().pipelines - before;
        // Once for the driver to compile, once to be judged.
        tune::measure(&gpu, &shape)?;
        let tuned = tune::measure(&gpu, &shape)?;
        let (chosen, table) = (tuned.chosen, tuned.table);
        let entries = time_all(&gpu, &inputs, [chosen, table], seconds)?;
        let best = &entries[0];
        let over = |candidate| {
            let entry = entries.iter().find(|entry| entry.candidate == candidate);
            let seconds = &entry.expect("what is asked about stays").seconds;
            let ratios = seconds.iter().zip(&best.seconds).map(|(a, b)| a / b);
            100.0 * (median(&ratios.collect::<Vec<_>>()) - 1.0)
        };
        worst_tuned = worst_tuned.max(over(chosen));
        worst_table = worst_table.max(over(table));
        println!(
            "{name:33} {first:5} {:7.2} {:8.1} {:8.1} {:9.3}  {}",
            (tuned.measured + tuned.first).as_secs_f64(),
            over(chosen),
            over(table),
            median(&best.seconds) * 1e3,
            best.candidate,
        );
        for (name, candidate) in [("tuned", chosen), ("table", table)] {
            if candidate != best.candidate {
                println!("{:76}  {name}: {candidate}", "");
            }
        }
        if std::env::var_os("QKV_BENCH_ALL").is_some() {
            for entry in &entries {
                let least = entry.seconds.iter().copied().fold(f64::INFINITY, f64::min);
                println!(
                    "    {:9.3} {:9.3} ms  {}",
                    median(&entry.seconds) * 1e3,
                    least * 1e3,
                    entry.candidate
                );
            }
        }
    }
    println!("worst: tuned {worst_tuned:.1} %, table {worst_table:.1} %");
    Ok(())
}
