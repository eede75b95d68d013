//! `qkv tune`: which kernels are best here.

use clap::Args;
use qkv::tune::{self, Shape, Tuned, default_shapes};
use qkv::{Error, Result};

use super::{Device, progress, say};

#[derive(Args)]
pub struct Options {
    /// What to measure: numbers, then any of causal, window=N, masked, dv=N, f16-math, and f32, f16 or bf16. Ten shapes
    /// of prefill and decode in f32 and f16 if not given
    #[arg(long, value_name = "B,H,Hk,Q,K,D[,WORD...]", num_args = 1..)]
    shapes: Vec<String>,
    /// Also every candidate, with its time or why it was not timed
    #[arg(long)]
    all: bool,
}

pub fn run(options: &Options, device: &Device) -> Result<()> {
    if device.no_tune {
        let bound = "not with `qkv tune`, which is there to do so";
        return Err(Error::refused("--no-tune", "given", bound));
    }
    let shapes = options.shapes.iter().map(|text| text.parse());
    let mut shapes: Vec<Shape> = shapes.collect::<Result<_>>()?;
    let gpu = device.open()?;
    let Some(path) = gpu.choices_path() else {
        let bound = "one to save in: XDG_CACHE_HOME or HOME";
        return Err(Error::refused(
            "the user's cache directory",
            "unknown",
            bound,
        ));
    };
    if shapes.is_empty() {
        shapes = default_shapes(gpu.caps());
    }
    let bar = progress(shapes.len() as u64, "tuning {bar:30} {pos}/{len} {msg}");
    for shape in &shapes {
        bar.set_message(shape.to_string());
        let tuned = tune::shape(&gpu, shape)?;
        bar.suspend(|| say(format_args!("{}", text(shape, &tuned, options.all))))?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    gpu.save_pipelines();
    say(format_args!("saved in {}\n", path.display()))
}

fn text(shape: &Shape, tuned: &Tuned, all: bool) -> String {
    let mut text = format!("{shape}: {tuned}\n");
    if !all {
        return text;
    }
    let [measured, heads] = tuned.heads;
    if measured < heads {
        text += &format!("    on {measured}/{heads} of its heads:\n");
    }
    for (candidate, time) in &tuned.ranking {
        let ms = time.as_secs_f64() * 1e3;
        let table = match *candidate == tuned.table {
            true => ", by the table",
            false => "",
        };
        text += &format!("    {ms:10.3} ms  {candidate}{table}\n");
    }
    for (candidate, why) in &tuned.rejected {
        text += &format!("    thrown out     {candidate}: {why}\n");
    }
    let [measured, first] = [tuned.measured, tuned.first].map(|time| time.as_secs_f64());
    text + &format!("    {measured:.1} s, and {first:.1} s for first runs\n")
}
