//! `qkv generate`.

use std::time::Instant;

use clap::Args;
use qkv::complete::{Completer, End, Rules};
use qkv::ops::Sampling;
use qkv::{Error, Result};

use super::{Device, ModelOptions, load, say};

/// The most tokens that are written where none are asked for.
const MAX_TOKENS: u32 = 256;

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// The prompt is a user's turn, written by the model's chat template
    #[arg(long)]
    chat: bool,
    /// Divides the logits: below 1 likely tokens become likelier; 0 always takes the likeliest
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    temperature: f32,
    /// Draw from so many of the likeliest tokens; 0 for all
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    top_k: u32,
    /// Draw from the likeliest tokens whose probabilities reach this; 1 for all
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    top_p: f32,
    /// Draw from tokens at least this many times as likely as the likeliest; 0 for all
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    min_p: f32,
    /// What logits of tokens that were read or written are divided by, or below zero multiplied; 1 for nothing
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    repeat_penalty: f32,
    /// The same seed draws the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// A text at which to stop, and which is not written; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// The most tokens to write; if not given 256, or what the context has room for
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Positions for the prompt and what follows; the model's if not given
    #[arg(long, value_name = "N")]
    context: Option<u32>,
    /// One JSON object, with tokens, score, times and memory
    #[arg(long)]
    json: bool,
    /// The text to go on with
    prompt: String,
}

pub fn run(options: &Options, device: &Device) -> Result<()> {
    let sampling = Sampling {
        repeat_penalty: options.repeat_penalty,
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
        min_p: options.min_p,
    };
    // What is wrong whatever the model is said before it is loaded.
    sampling.check()?;
    if options.prompt.trim().is_empty() {
        return Err(Error::refused(
            "the prompt",
            "empty",
            "a text to go on with",
        ));
    }
    if options.model.model.is_none() {
        let bound = "a directory or a GGUF file: the embedded model translates";
        return Err(Error::refused("--model", "absent", bound));
    }
    let gpu = device.open()?;
    let (source, dtype) = (options.model.source()?, options.model.dtype());
    let completer = load(&gpu, |gpu, progress| {
        Completer::load(gpu, &source, dtype, progress)
    })?;
    let prompt = completer.prompt(&options.prompt, options.chat)?;
    let rules = Rules {
        max_tokens: max_tokens(options, &completer, prompt.len() as u32)?,
        sampling,
        seed: options.seed,
        stop: options.stop.clone(),
    };

    let started = Instant::now();
    let mut first = None;
    let done = completer.complete(&prompt, &rules, &mut |text| {
        first.get_or_insert_with(|| started.elapsed());
        match options.json {
            true => Ok(()),
            false => say(format_args!("{text}")),
        }
    })?;
    let all = started.elapsed();
    let first = first.unwrap_or(all);
    let tokens = done.tokens.len();
    // Of the steps behind the first, which reads the prompt too.
    let rate = (tokens.max(1) - 1) as f64 / (all - first).as_secs_f64().max(1e-9);
    if options.json {
        let (end, by) = match &done.end {
            End::Token(token) => ("token", completer.tokenizer.token(*token)),
            End::Stop(stop) => ("stop", Some(stop.clone())),
            End::MaxTokens => ("max_tokens", None),
        };
        let counters = gpu.counters();
        let json = serde_json::json!({
            "prompt": options.prompt,
            "prompt_ids": prompt,
            "text": done.text,
            "ids": done.tokens,
            "score": done.score,
            "end": end,
            "ended_by": by,
            "first_token_seconds": first.as_secs_f64(),
            "tokens_per_second": rate,
            "cache_bytes": done.cache_bytes,
            "device": gpu.caps().name,
            "device_bytes": counters.bytes,
            "device_peak_bytes": counters.peak_bytes,
        });
        say(format_args!("{json}\n"))?;
    } else {
        say(format_args!("\n"))?;
    }
    eprintln!(
        "{tokens} tokens, {rate:.1} a second; {:.2} s to the first, behind {} of the prompt; {} bytes of cache",
        first.as_secs_f64(),
        prompt.len(),
        done.cache_bytes
    );
    gpu.save_pipelines();
    Ok(())
}

/// How many tokens may follow a prompt of that length.
fn max_tokens(options: &Options, completer: &Completer, prompt: u32) -> Result<u32> {
    let most = completer.model.spec().max_positions;
    let context = options.context.unwrap_or(most);
    if context == 0 || context > most {
        let bound = format!("1 to the model's {most} positions");
        return Err(Error::refused("--context", context, bound));
    }
    if prompt > context {
        let long = format!("{prompt} tokens long");
        let bound = format!("at most --context, {context}");
        return Err(Error::refused("the prompt", long, bound));
    }
    // The last token needs no position.
    let room = context - prompt + 1;
    match options.max_tokens {
        None => Ok(room.min(MAX_TOKENS)),
        Some(wanted) if wanted == 0 || wanted > room => {
            let bound =
                format!("1 to {room}: a context of {context} and a prompt of {prompt} tokens");
            Err(Error::refused("--max-tokens", wanted, bound))
        }
        Some(wanted) => Ok(wanted),
    }
}
