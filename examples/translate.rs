//! Translates a sentence and shows, token by token, what the decoder looked at.
//!
//!     cargo run --release --example translate -- fra "Where is the train station?"

use qkv::generate::Settings;
use qkv::gpu::{DType, Gpu};
use qkv::model::Source;
use qkv::translate::Translator;

fn main() -> qkv::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let language = arguments.next().unwrap_or("fra".into());
    let text = arguments
        .next()
        .unwrap_or("Where is the train station?".into());

    let gpu = Gpu::new()?;
    let translator = Translator::load(&gpu, &Source::Embedded, DType::F32, &mut |_, _| {})?;
    let settings = Settings {
        beams: 4,
        ..translator.settings.clone()
    };
    let ids = translator.encode("the text", &text, Some(&language))?;
    let batch = translator.translate(&[ids], &settings, &mut |_| {})?;
    let translation = &batch.translations[0];
    println!("{}", translation.text);

    let attention = translator.attention(translation, None, None)?;
    let tokenizer = &translator.tokenizer;
    for (step, weights) in attention.cross.chunks(attention.source.len()).enumerate() {
        let heaviest = (0..weights.len()).max_by(|&a, &b| weights[a].total_cmp(&weights[b]));
        if let Some(ix) = heaviest {
            let (written, read) = (attention.written[step], attention.source[ix]);
            println!(
                "{:>12} looked at {} ({:.2})",
                tokenizer.piece(written),
                tokenizer.source_piece(read),
                weights[ix]
            );
        }
    }
    Ok(())
}
