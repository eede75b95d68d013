//! From text to text: a tokenizer, a model and its settings as one.

use crate::generate::{Generator, Sequence, Settings, Step};
use crate::gpu::{DType, Gpu};
use crate::model::{Model, Padded, Source};
use crate::text::Tokenizer;
use crate::{Error, Result};

/// A translation model, ready.
pub struct Translator {
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its stacks, on the device.
    pub model: Model,
    /// What its directory says of generation.
    pub settings: Settings,
}

/// One translated text.
#[derive(Clone, Debug, PartialEq)]
pub struct Translation {
    /// The translation.
    pub text: String,
    /// What the encoder read.
    pub source: Vec<u32>,
    /// What the decoder wrote, the end token included, and its score.
    pub target: Sequence,
}

/// A batch's translations and what they took.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// In the order of the texts.
    pub translations: Vec<Translation>,
    /// Decoder steps of the batch; its encoder took one.
    pub decoder_steps: u32,
}

/// What the decoder attended to while it wrote: mean over heads and layers, or one of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Source tokens, S.
    pub source: Vec<u32>,
    /// Tokens written, T.
    pub written: Vec<u32>,
    /// What the decoder had read before each: the start token, then those written. T
    pub read: Vec<u32>,
    /// Weights on the source tokens by step. `[T, S]`
    pub cross: Vec<f32>,
    /// Weights on what was read by step; zero for what came later. `[T, T]`
    pub own: Vec<f32>,
}

impl Translator {
    /// Loads a model's directory, or the embedded model. `progress` hears of bytes taken and bytes in all.
    ///
    /// # Errors
    /// As [`Model::load`] and [`Tokenizer::load`]; a tokenizer that is larger than the model's vocabulary.
    pub fn load(
        gpu: &Gpu,
        source: &Source,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Translator> {
        let tokenizer = Tokenizer::load(source.path(), &|name| {
            Ok(source.file(name)?.map(|bytes| bytes.to_vec()))
        })?;
        let model = Model::load(gpu, source, dtype, progress)?;
        let spec = model.spec();
        let sizes = [spec.source_vocab, spec.target_vocab];
        if tokenizer
            .vocabularies()
            .iter()
            .zip(sizes)
            .any(|(&tokens, size)| tokens > size)
        {
            let what = format_args!(
                "its tokenizer has {:?} tokens, its model {sizes:?}",
                tokenizer.vocabularies()
            );
            return Err(Error::file(source.path(), what));
        }
        let mut settings = Settings::load(source)?;
        settings.max_tokens = settings.max_tokens.min(spec.max_positions);
        Ok(Translator {
            tokenizer,
            model,
            settings,
        })
    }

    /// The ids of a text with its language's tag; `what` names the text in errors.
    ///
    /// # Errors
    /// [`Error::Refused`] for a text that is blank, or longer than the model's positions.
    pub fn encode(&self, what: &str, text: &str, language: Option<&str>) -> Result<Vec<u32>> {
        if text.trim().is_empty() {
            return Err(Error::refused(what, "empty", "a text to translate"));
        }
        let ids = self.tokenizer.encode(text, language)?;
        let most = self.model.spec().max_positions as usize;
        if ids.len() > most {
            let bound = format!("the model reads at most {most}: split the text");
            return Err(Error::refused(
                what,
                format_args!("{} tokens long", ids.len()),
                bound,
            ));
        }
        Ok(ids)
    }

    /// Translates a batch of encoded texts. `heard` gets every decoder step as it is taken.
    ///
    /// # Errors
    /// As [`Model::encode`] and [`Generator::new`].
    pub fn translate(
        &self,
        sources: &[Vec<u32>],
        settings: &Settings,
        heard: &mut dyn FnMut(&Step),
    ) -> Result<Batch> {
        let memory = self.model.encode(&Padded::new(sources, 0), false)?;
        let mut generator = Generator::new(&self.model, &memory, settings)?;
        for step in &mut generator {
            heard(&step?);
        }
        let translations = generator.sequences().into_iter().zip(sources);
        Ok(Batch {
            decoder_steps: generator.steps(),
            translations: translations
                .map(|(target, source)| Translation {
                    text: self.tokenizer.decode(&target.tokens),
                    source: source.clone(),
                    target,
                })
                .collect(),
        })
    }

    /// What the decoder attended to at each step of a translation: of one layer and head, or the mean
    /// over those not chosen. Computed by one causal pass over what was written, which gives what the
    /// steps gave.
    ///
    /// # Errors
    /// [`Error::Refused`] for a layer or head that the decoder has not.
    pub fn attention(
        &self,
        translation: &Translation,
        layer: Option<usize>,
        head: Option<usize>,
    ) -> Result<Attention> {
        let stack = self.model.spec().decoder;
        let within = |what: &str, chosen: Option<usize>, n: u32| match chosen {
            Some(ix) if ix >= n as usize => Err(Error::refused(
                what,
                ix,
                format!("0 to {}: the decoder has {n}", n - 1),
            )),
            Some(ix) => Ok(ix..ix + 1),
            None => Ok(0..n as usize),
        };
        let layers = within("layer", layer, stack.layers)?;
        let heads = within("head", head, stack.heads)?;
        let written = translation.target.tokens.clone();
        if written.is_empty() {
            return Err(Error::refused(
                "the translation",
                "empty",
                "at least one token",
            ));
        }
        let mut read = vec![self.settings.start];
        read.extend(&written[..written.len() - 1]);
        let memory = self
            .model
            .encode(&Padded::new(&[&translation.source], 0), false)?;
        let forward = self
            .model
            .forward(&memory, &Padded::new(&[&read], 0), true)?;
        let mean = |taps: &[crate::gpu::Tensor], columns: usize| -> Result<Vec<f32>> {
            let size = read.len() * columns;
            let mut sum = vec![0.0; size];
            for tap in &taps[layers.clone()] {
                let weights = self.model.gpu().read_floats(tap)?;
                for head in weights.chunks_exact(size).take(heads.end).skip(heads.start) {
                    sum.iter_mut()
                        .zip(head)
                        .for_each(|(sum, weight)| *sum += weight);
                }
            }
            let n = (layers.len() * heads.len()) as f32;
            sum.iter_mut().for_each(|sum| *sum /= n);
            Ok(sum)
        };
        Ok(Attention {
            cross: mean(&forward.cross_attentions, translation.source.len())?,
            own: mean(&forward.decoder_attentions, read.len())?,
            source: translation.source.clone(),
            written,
            read,
        })
    }
}
