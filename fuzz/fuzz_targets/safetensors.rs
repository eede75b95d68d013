//! Any bytes as a model.safetensors: an error, or tensors that can all be taken.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| qkv::model::fuzz_safetensors(bytes));
