//! Any bytes as a GGUF file: an error, or tensors that can all be read.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use qkv::gguf::Header;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::parse(Path::new("fuzz"), bytes) else {
        return;
    };
    for info in header.tensors.values() {
        let values = info.blocks.expand(&bytes[info.range.clone()]);
        let elements: u64 = info.shape.iter().map(|&n| n as u64).product();
        assert_eq!(values.len() as u64, elements);
    }
    for key in header.metadata.keys() {
        let _ = (header.text(key), header.u32(key), header.f32(key));
        let _ = (header.flag(key), header.list(key), header.texts(key));
    }
});
