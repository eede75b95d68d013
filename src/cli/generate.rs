//! `qkv generate`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use qkv::complete::{Completer, Completion, Drafts, End, Heard, Rules};
use qkv::generate::{Batch, BatchSettings};
use qkv::gpu::DType;
use qkv::model::{CausalModel, Source};
use qkv::ops::Sampling;
use qkv::{Error, Result};

use super::{Device, ModelOptions, load, progress, say_or_end};

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
    /// What logits of tokens that were read or written are divided by, or below zero multiplied; 1 for nothing, and what
    /// the model's directory asks for if not given
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repeat_penalty: Option<f32>,
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
    /// How keys and values are stored: f32, f16, bf16, q8_0 or q4_0, or one of keys and one of values; as --dtype if
    /// not given
    #[arg(long, value_name = "TYPE[,TYPE]", value_parser = kv_cache)]
    kv_cache: Option<[DType; 2]>,
    /// Take several tokens a step where a draft guesses them: what followed the text's last tokens before, or a
    /// smaller model of the same vocabulary, a directory or a GGUF file; greedy texts only, which stay the same
    #[arg(long, value_name = "ngram|MODEL", conflicts_with = "batch")]
    draft: Option<PathBuf>,
    /// The tokens of each branch of a draft
    #[arg(long, value_name = "N", default_value_t = 5, requires = "draft", value_parser = clap::value_parser!(u32).range(1..=16))]
    draft_tokens: u32,
    /// Go on with every line of a file, many at a time; line n, from 0, draws by the seed + n
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    batch: Option<PathBuf>,
    /// The most tokens that a step of a batch computes
    #[arg(long, value_name = "N", default_value_t = 512, conflicts_with = "prompt", value_parser = clap::value_parser!(u32).range(1..))]
    budget: u32,
    /// Positions of a page of a batch's cache
    #[arg(long, value_name = "N", default_value_t = 16, conflicts_with = "prompt", value_parser = clap::value_parser!(u32).range(1..))]
    page_size: u32,
    /// The most lines of a batch that are written at a time
    #[arg(long, value_name = "N", default_value_t = 32, conflicts_with = "prompt", value_parser = clap::value_parser!(u32).range(1..))]
    max_sequences: u32,
    /// One JSON object, with tokens, score, times and memory; of a batch one a line
    #[arg(long)]
    json: bool,
    /// The text to go on with
    #[arg(required_unless_present = "batch")]
    prompt: Option<String>,
}

/// A prompt, read and checked.
struct Request<'o> {
    text: &'o str,
    ids: Vec<u32>,
    rules: Rules,
}

pub fn run(options: &Options, device: &Device) -> Result<()> {
    let mut sampling = Sampling {
        repeat_penalty: options.repeat_penalty.unwrap_or(1.0),
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
        min_p: options.min_p,
    };
    // What is wrong whatever the model is said before it is loaded.
    sampling.check()?;
    let file = match &options.batch {
        Some(path) => std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?,
        None => String::new(),
    };
    let texts: Vec<&str> = match &options.prompt {
        Some(prompt) => vec![prompt],
        None => file.lines().collect(),
    };
    if texts.is_empty() {
        return Err(Error::refused(
            "--batch",
            "an empty file",
            "a prompt a line",
        ));
    }
    for (ix, text) in texts.iter().enumerate() {
        if text.trim().is_empty() {
            let empty = Error::refused("the prompt", "empty", "a text to go on with");
            return Err(of_line(options, ix, empty));
        }
    }
    if options.model.model.is_none() {
        let bound = "a directory or a GGUF file: the embedded model translates";
        return Err(Error::refused("--model", "absent", bound));
    }
    let gpu = device.open()?;
    let (source, dtype) = (options.model.source()?, options.model.dtype());
    let mut completer = load(&gpu, |gpu, progress| {
        Completer::load(gpu, &source, dtype, progress)
    })?;
    if options.repeat_penalty.is_none() {
        sampling.repeat_penalty = completer.repeat_penalty;
    }
    completer.kv_types = options.kv_cache;
    completer.drafts = match &options.draft {
        None => None,
        Some(path) if path.as_os_str() == "ngram" => Some(Drafts::Ngram(options.draft_tokens)),
        Some(path) => {
            let source = Source::at(path.clone());
            let model = load(&gpu, |gpu, progress| {
                CausalModel::load(gpu, &source, dtype, progress)
            })?;
            Some(Drafts::Model(Box::new(model), options.draft_tokens))
        }
    };
    let request = |ix: usize, text: &str| {
        let ids = completer.prompt(text, options.chat)?;
        let rules = Rules {
            max_tokens: max_tokens(options, &completer, ids.len() as u32)?,
            sampling,
            seed: options.seed.wrapping_add(ix as u64),
            stop: options.stop.clone(),
        };
        Ok((ids, rules))
    };
    let mut requests = Vec::with_capacity(texts.len());
    for (ix, text) in texts.iter().enumerate() {
        let (ids, rules) = request(ix, text).map_err(|e| of_line(options, ix, e))?;
        requests.push(Request { text, ids, rules });
    }
    match options.batch {
        Some(_) => write_batch(options, &completer, &requests)?,
        None => write_one(options, &completer, &requests[0])?,
    }
    gpu.save_pipelines();
    Ok(())
}

/// An error of a line of a batch's file says so.
fn of_line(options: &Options, ix: usize, error: Error) -> Error {
    match &options.batch {
        Some(path) => Error::file(path, format_args!("line {}: {error}", ix + 1)),
        None => error,
    }
}

fn write_one(options: &Options, completer: &Completer, request: &Request) -> Result<()> {
    let started = Instant::now();
    let mut first = None;
    let done = completer.complete(&request.ids, &request.rules, &mut |text| {
        first.get_or_insert_with(|| started.elapsed());
        match options.json {
            true => Ok(()),
            false => say_or_end(format_args!("{text}")),
        }
    })?;
    let all = started.elapsed();
    let first = first.unwrap_or(all);
    let tokens = done.tokens.len();
    // Of the steps behind the first, which reads the prompt too.
    let rate = (tokens.max(1) - 1) as f64 / (all - first).as_secs_f64().max(1e-9);
    if options.json {
        let gpu = completer.model.gpu();
        let counters = gpu.counters();
        let mut json = json(completer, request, &done);
        json["first_token_seconds"] = first.as_secs_f64().into();
        json["tokens_per_second"] = rate.into();
        json["cache_bytes"] = done.cache_bytes.into();
        if let Some(drafts) = done.drafts {
            json["steps"] = drafts.steps.into();
            json["drafted"] = drafts.drafted.into();
            json["accepted"] = drafts.accepted.into();
        }
        json["device"] = gpu.caps().name.as_str().into();
        json["device_bytes"] = counters.bytes.into();
        json["device_peak_bytes"] = counters.peak_bytes.into();
        say_or_end(format_args!("{json}\n"))?;
    } else {
        say_or_end(format_args!("\n"))?;
    }
    eprintln!(
        "{tokens} tokens, {rate:.1} a second; {:.2} s to the first, behind {} of the prompt; {} bytes of cache",
        first.as_secs_f64(),
        request.ids.len(),
        done.cache_bytes
    );
    if let Some(drafts) = done.drafts {
        eprintln!(
            "{} of {} drafted tokens accepted, {:.2} a step",
            drafts.accepted,
            drafts.drafted,
            f64::from(drafts.accepted) / f64::from(drafts.steps.max(1))
        );
    }
    Ok(())
}

/// Texts come in the file's order, each when those before it have come. One that fails is said to have failed, and
/// the others go on.
fn write_batch(options: &Options, completer: &Completer, requests: &[Request]) -> Result<()> {
    let settings = BatchSettings {
        pages: u32::MAX,
        page_len: options.page_size,
        types: options.kv_cache.unwrap_or([options.model.dtype(); 2]),
        budget: options.budget,
        max_sequences: options.max_sequences,
        cascade: false,
    };
    // The last token is written nowhere.
    let positions = |request: &Request| request.ids.len() as u32 + request.rules.max_tokens - 1;
    let positions: Vec<u32> = requests.iter().map(positions).collect();
    let mut batch = Batch::for_texts(&completer.model, settings, &positions)?;
    let bar = progress(
        requests.len() as u64,
        "{bar:30} {pos} / {len} texts, {msg} tokens",
    );
    let started = Instant::now();
    let mut done: Vec<Option<Result<Completion>>> = requests.iter().map(|_| None).collect();
    let (mut tokens, mut said, mut failed) = (0u64, 0, 0);
    let asked: Vec<_> = requests
        .iter()
        .map(|request| (&request.ids[..], request.rules.clone()))
        .collect();
    completer.complete_batch(&mut batch, &asked, &mut |ix, heard| {
        match heard {
            Heard::Token => {
                tokens += 1;
                bar.set_message(tokens.to_string());
            }
            Heard::Ended(result) => {
                bar.inc(1);
                done[ix] = Some(result);
            }
        }
        while let Some(result) = done.get_mut(said).and_then(Option::take) {
            let request = &requests[said];
            said += 1;
            let block = match (result, options.json) {
                (Ok(done), true) => {
                    let mut json = json(completer, request, &done);
                    json["line"] = said.into();
                    format!("{json}\n")
                }
                (Ok(done), false) => format!("> {}\n{}\n\n", request.text, done.text),
                (Err(error), _) => {
                    failed += 1;
                    bar.suspend(|| eprintln!("qkv: {}", of_line(options, said - 1, error)));
                    continue;
                }
            };
            bar.suspend(|| say_or_end(format_args!("{block}")))?;
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    let n = requests.len();
    eprintln!(
        "{n} texts, {tokens} tokens, {:.1} a second; {} tokens computed, {} preemptions; {} bytes of cache",
        tokens as f64 / started.elapsed().as_secs_f64().max(1e-9),
        batch.computed(),
        batch.preemptions(),
        batch.cache().bytes()
    );
    match failed {
        0 => Ok(()),
        failed => Err(Error::refused(
            "--batch",
            format_args!("a file of {n} prompts, of which {failed} failed"),
            "see above",
        )),
    }
}

fn json(completer: &Completer, request: &Request, done: &Completion) -> serde_json::Value {
    let (end, by) = match &done.end {
        End::Token(token) => ("token", completer.tokenizer.token(*token)),
        End::Stop(stop) => ("stop", Some(stop.clone())),
        End::MaxTokens => ("max_tokens", None),
    };
    serde_json::json!({
        "prompt": request.text,
        "prompt_ids": request.ids,
        "text": done.text,
        "ids": done.tokens,
        "score": done.score,
        "end": end,
        "ended_by": by,
    })
}

/// The types of keys and of values.
fn kv_cache(text: &str) -> std::result::Result<[DType; 2], String> {
    let parse = |name: &str| {
        let types = [
            DType::F32,
            DType::F16,
            DType::BF16,
            DType::Q8_0,
            DType::Q4_0,
        ];
        let found = types.into_iter().find(|dtype| dtype.name() == name);
        found.ok_or_else(|| format!("{name:?} is none of f32, f16, bf16, q8_0 and q4_0"))
    };
    let (k, v) = text.split_once(',').unwrap_or((text, text));
    Ok([parse(k)?, parse(v)?])
}

/// How many tokens may follow a prompt of that length.
fn max_tokens(options: &Options, completer: &Completer, prompt: u32) -> Result<u32> {
    let most = completer.model.spec().steady_positions();
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
