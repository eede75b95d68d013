//! GGUF files for tests, also broken ones.

/// A value of the metadata with its type's number before it.
pub fn value(ty: u32, payload: &[u8]) -> Vec<u8> {
    [&ty.to_le_bytes()[..], payload].concat()
}

/// A text with its length before it.
pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// An array, itself a value of type 9.
pub fn array(ty: u32, items: &[Vec<u8>]) -> Vec<u8> {
    let mut out = ty.to_le_bytes().to_vec();
    out.extend((items.len() as u64).to_le_bytes());
    out.extend(items.concat());
    value(9, &out)
}

/// A tensor as the file has it: innermost extent first.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub ty: u32,
    pub shape: Vec<u64>,
    pub offset: u64,
}

/// A file's parts, all of which a test may get wrong.
#[derive(Clone)]
pub struct File {
    pub magic: [u8; 4],
    pub version: u32,
    pub n_tensors: Option<u64>,
    pub n_metadata: Option<u64>,
    pub metadata: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Entry>,
    pub body: Vec<u8>,
    pub alignment: usize,
}

impl File {
    pub fn new() -> File {
        File {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_metadata: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
            body: Vec::new(),
            alignment: 32,
        }
    }

    pub fn with(mut self, key: &str, value: Vec<u8>) -> File {
        self.metadata.push((key.into(), value));
        self
    }

    pub fn tensor(mut self, name: &str, ty: u32, shape: &[u64], data: &[u8]) -> File {
        self.body
            .resize(self.body.len().next_multiple_of(self.alignment), 0);
        self.tensors.push(Entry {
            name: name.into(),
            ty,
            shape: shape.to_vec(),
            offset: self.body.len() as u64,
        });
        self.body.extend(data);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        let n = self.n_tensors.unwrap_or(self.tensors.len() as u64);
        out.extend(n.to_le_bytes());
        let n = self.n_metadata.unwrap_or(self.metadata.len() as u64);
        out.extend(n.to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(text(key));
            out.extend(value);
        }
        for entry in &self.tensors {
            out.extend(text(&entry.name));
            out.extend((entry.shape.len() as u32).to_le_bytes());
            entry.shape.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(entry.ty.to_le_bytes());
            out.extend(entry.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.body);
        out
    }
}
