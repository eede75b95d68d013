//! `qkv translate`.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use qkv::generate::Settings;
use qkv::text::Tokenizer;
use qkv::translate::{Translation, Translator};
use qkv::{Error, Result};

use super::{Device, ModelOptions, explain, load, progress, say_or_end};

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// The language to translate to: fra or zho with the embedded model
    #[arg(long, value_name = "LANG")]
    to: Option<String>,
    /// Beams; 1, the default whatever the model's files say, is greedy
    #[arg(long, value_name = "N", default_value_t = 1)]
    beam: u32,
    /// The most tokens to write for a line; what the model's generation_config.json says, if not given
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Lines that are translated together
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// One JSON object a line, with tokens, score, steps and memory
    #[arg(long)]
    json: bool,
    /// Say for every step which words it attended to
    #[arg(long)]
    explain: bool,
    /// Draw what the steps attended to; one text only
    #[arg(long, value_name = "FILE.png")]
    attention: Option<PathBuf>,
    /// The decoder layer to show, from 0; the mean if not given
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
    /// The head to show, from 0; the mean if not given
    #[arg(long, value_name = "N")]
    head: Option<usize>,
    /// Another font for the picture
    #[arg(long, value_name = "FILE", requires = "attention")]
    font: Option<PathBuf>,
    /// The texts; the lines of standard input if there are none
    text: Vec<String>,
}

/// A line of input: its name in errors, and its text.
struct Line {
    name: String,
    text: String,
    /// A blank line of standard input, which stays blank.
    blank: bool,
}

pub fn run(options: &Options, device: &Device) -> Result<()> {
    let typed = options.text.is_empty() && std::io::stdin().is_terminal();
    let lines = match typed {
        true => None,
        false => Some(lines(options)?),
    };
    let n = lines.as_ref().map_or(0, Vec::len);
    if options.attention.is_some() && n != 1 {
        return Err(Error::refused(
            "--attention",
            format_args!("for {n} texts"),
            "one text",
        ));
    }
    if (options.layer.is_some() || options.head.is_some())
        && !options.explain
        && options.attention.is_none()
    {
        return Err(Error::refused(
            "--layer or --head",
            "given",
            "with --explain or --attention only",
        ));
    }
    let started = Instant::now();
    let gpu = device.open()?;
    let (source, dtype) = (options.model.source()?, options.model.dtype());
    let translator = load(&gpu, |gpu, progress| {
        Translator::load(gpu, &source, dtype, progress)
    })?;
    let settings = settings(options, &translator)?;
    let language = language(options, &translator.tokenizer)?;
    let session = Session {
        options,
        translator: &translator,
        settings,
        language,
    };
    tracing::info!(ms = started.elapsed().as_secs_f64() * 1e3, "ready");
    match lines {
        Some(lines) => session.translate(&lines)?,
        None => session.converse()?,
    }
    gpu.save_pipelines();
    Ok(())
}

fn lines(options: &Options) -> Result<Vec<Line>> {
    let name = |ix: usize, kind: &str| format!("{kind} {}", ix + 1);
    if !options.text.is_empty() {
        let texts = options.text.iter().enumerate();
        return Ok(texts
            .map(|(ix, text)| Line {
                name: name(ix, "text"),
                text: text.clone(),
                blank: false,
            })
            .collect());
    }
    let mut bytes = Vec::new();
    std::io::stdin()
        .read_to_end(&mut bytes)
        .map_err(|e| Error::file("standard input", e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = e.as_bytes()[..at]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count()
            + 1;
        Error::file(
            "standard input",
            format_args!("not UTF-8: byte {at}, in line {line}"),
        )
    })?;
    if text.trim().is_empty() {
        return Err(Error::refused(
            "standard input",
            "empty",
            "a text to translate",
        ));
    }
    let lines = text.lines().enumerate();
    Ok(lines
        .map(|(ix, line)| Line {
            name: name(ix, "line"),
            text: line.to_string(),
            blank: line.trim().is_empty(),
        })
        .collect())
}

fn settings(options: &Options, translator: &Translator) -> Result<Settings> {
    let own = translator.settings.clone();
    Ok(Settings {
        beams: options.beam,
        max_tokens: options.max_tokens.unwrap_or(own.max_tokens),
        ..own
    })
}

/// The language asked for; where the model knows several, one must be, and where it knows one, that is meant.
fn language<'o>(options: &'o Options, tokenizer: &'o Tokenizer) -> Result<Option<&'o str>> {
    match (options.to.as_deref(), tokenizer.languages().as_slice()) {
        (Some(wanted), _) => Ok(Some(wanted)),
        (None, []) => Ok(None),
        (None, [one]) => Ok(Some(one)),
        (None, languages) => Err(Error::refused(
            "--to",
            "absent",
            format!("one of {}", languages.join(", ")),
        )),
    }
}

struct Session<'a> {
    options: &'a Options,
    translator: &'a Translator,
    settings: Settings,
    language: Option<&'a str>,
}

impl Session<'_> {
    /// Translates each line as it is typed, until the end of input.
    fn converse(&self) -> Result<()> {
        for (ix, text) in std::io::stdin().lines().enumerate() {
            let text = text.map_err(|e| Error::file("standard input", e))?;
            let line = Line {
                name: format!("line {}", ix + 1),
                blank: text.trim().is_empty(),
                text,
            };
            self.translate(&[line])?;
        }
        Ok(())
    }

    /// Translates in batches and says the translations in order. All of the input is checked before the
    /// first line goes out.
    fn translate(&self, lines: &[Line]) -> Result<()> {
        let mut ids = Vec::with_capacity(lines.len());
        for line in lines {
            ids.push(match line.blank {
                true => Vec::new(),
                false => self
                    .translator
                    .encode(&line.name, &line.text, self.language)?,
            });
        }
        // On a terminal the translations themselves show how far it is.
        let long = lines.len() > self.options.batch as usize && !std::io::stdout().is_terminal();
        let template = "translating {bar:30} {pos} / {len} lines {eta}";
        let bar = long.then(|| progress(lines.len() as u64, template));
        let batch = self.options.batch as usize;
        for (lines, ids) in lines.chunks(batch).zip(ids.chunks(batch)) {
            self.batch(lines, ids)?;
            if let Some(bar) = &bar {
                bar.inc(lines.len() as u64);
            }
        }
        if let Some(bar) = &bar {
            bar.finish_and_clear();
        }
        Ok(())
    }

    fn batch(&self, lines: &[Line], ids: &[Vec<u32>]) -> Result<()> {
        let sources: Vec<Vec<u32>> = ids.iter().filter(|ids| !ids.is_empty()).cloned().collect();
        // One greedy text on a terminal is shown as it comes.
        let shown = self.options.explain || self.options.attention.is_some();
        let plain = !self.options.json && !shown;
        let stream = plain
            && lines.len() == 1
            && self.settings.beams == 1
            && std::io::stdout().is_terminal();
        let mut streaming = self.translator.tokenizer.streaming();
        let mut heard: Result<()> = Ok(());
        let mut translations = Vec::new().into_iter();
        let mut decoder_steps = 0;
        if !sources.is_empty() {
            let done = self
                .translator
                .translate(&sources, &self.settings, &mut |step| {
                    let token = step.tokens.first().copied().flatten();
                    if let (true, Some(token), true) = (stream, token, heard.is_ok())
                        && let Some(text) = streaming.push(token)
                    {
                        heard = say_or_end(format_args!("{text}"));
                    }
                })?;
            heard?;
            decoder_steps = done.decoder_steps;
            translations = done.translations.into_iter();
        }
        for (line, ids) in lines.iter().zip(ids) {
            let translation = match ids.is_empty() {
                true => None,
                false => translations.next(),
            };
            match translation {
                None if self.options.json => {
                    let blank = serde_json::json!({ "source": line.text, "translation": "" });
                    say_or_end(format_args!("{blank}\n"))?
                }
                None => say_or_end(format_args!("\n"))?,
                Some(_) if stream => say_or_end(format_args!("{}\n", streaming.finish()))?,
                Some(translation) => self.show(line, &translation, decoder_steps)?,
            }
        }
        Ok(())
    }

    fn show(&self, line: &Line, translation: &Translation, decoder_steps: u32) -> Result<()> {
        let tokenizer = &self.translator.tokenizer;
        let (layer, head) = (self.options.layer, self.options.head);
        let wanted = self.options.attention.is_some() || self.options.explain;
        let attention = match wanted {
            true => Some(self.translator.attention(translation, layer, head)?),
            false => None,
        };
        if let (Some(path), Some(attention)) = (&self.options.attention, &attention) {
            let shown = explain::Shown { layer, head };
            let caption = format!("{} → {}", line.text.trim(), translation.text);
            let font = self.options.font.as_deref();
            explain::draw(tokenizer, attention, shown, &caption, font, path)?;
        }
        let explained = attention.as_ref().filter(|_| self.options.explain);
        if self.options.json {
            let mut json = self.json(line, translation, decoder_steps);
            if let Some(attention) = explained {
                json["steps"] = explain::json(tokenizer, attention);
            }
            return say_or_end(format_args!("{json}\n"));
        }
        say_or_end(format_args!("{}\n", translation.text))?;
        match explained {
            Some(attention) => say_or_end(format_args!(
                "{}",
                explain::text(tokenizer, attention, decoder_steps)
            )),
            None => Ok(()),
        }
    }

    fn json(
        &self,
        line: &Line,
        translation: &Translation,
        decoder_steps: u32,
    ) -> serde_json::Value {
        let (tokenizer, gpu) = (&self.translator.tokenizer, self.translator.model.gpu());
        let source = translation.source.iter();
        let source = source.map(|&id| tokenizer.source_piece(id));
        let target = translation.target.tokens.iter();
        let target = target.map(|&id| tokenizer.piece(id));
        let counters = gpu.counters();
        serde_json::json!({
            "source": line.text,
            "translation": translation.text,
            "source_tokens": source.collect::<Vec<_>>(),
            "tokens": target.collect::<Vec<_>>(),
            "ids": translation.target.tokens,
            "score": translation.target.score,
            "encoder_steps": 1,
            "decoder_steps": decoder_steps,
            "device": gpu.caps().name,
            "device_bytes": counters.bytes,
            "device_peak_bytes": counters.peak_bytes,
        })
    }
}
