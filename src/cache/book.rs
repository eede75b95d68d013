//! Which page holds what: the host's side of a paged cache, without a device.

use std::collections::{BTreeMap, HashMap};

use crate::{Error, Result};

/// A sequence of a paged cache; its number may be given anew once it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId(pub(crate) u32);

/// Positions that a query at `len`, the next one, does not see.
pub(crate) fn unseen(len: u32, window: u32) -> u32 {
    (len + 1).saturating_sub(window)
}

/// The entry of a page that is no longer kept.
pub(crate) const NO_PAGE: u32 = u32::MAX;

/// The keys that a sequence keeps: all of them, or the first and the last ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// Pages whose positions are all farther back than this are given back; none if not set.
    pub window: Option<u32>,
    /// But not those that hold the first positions (attention sinks, Xiao et al. 2023).
    pub first: u32,
}

#[derive(Clone, Debug)]
struct Sequence {
    /// By stretch of positions; [`NO_PAGE`] where it is no longer kept.
    pages: Vec<u32>,
    tokens: Vec<u32>,
    keep: Keep,
}

/// Pages with their number of holders, and the sequences that hold them.
#[derive(Clone, Debug)]
pub(crate) struct Book {
    page_len: u32,
    free: Vec<u32>,
    holders: Vec<u32>,
    sequences: Vec<Option<Sequence>>,
    /// Full pages by what precedes them and what they hold: the tokens decide, the hash only finds.
    known: HashMap<(u32, Box<[u32]>), u32>,
    /// The key in `known` of each page that is there.
    keys: Vec<Option<(u32, Box<[u32]>)>>,
}

impl Book {
    pub(crate) fn new(pages: u32, page_len: u32) -> Self {
        Book {
            page_len,
            free: (0..pages).rev().collect(),
            holders: vec![0; pages as usize],
            sequences: Vec::new(),
            known: HashMap::new(),
            keys: vec![None; pages as usize],
        }
    }

    fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.sequences.get(id.0 as usize);
        sequence.and_then(Option::as_ref).ok_or_else(|| {
            Error::refused(
                "a sequence",
                format_args!("{}", id.0),
                "one that is not dropped",
            )
        })
    }

    fn put(&mut self, sequence: Sequence) -> SequenceId {
        let at = self.sequences.iter().position(Option::is_none);
        let at = at.unwrap_or_else(|| {
            self.sequences.push(None);
            self.sequences.len() - 1
        });
        self.sequences[at] = Some(sequence);
        SequenceId(at as u32)
    }

    /// Positions that a sequence fills.
    pub(crate) fn len(&self, id: SequenceId) -> Result<u32> {
        Ok(self.get(id)?.tokens.len() as u32)
    }

    pub(crate) fn tokens(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.get(id)?.tokens)
    }

    pub(crate) fn pages(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.get(id)?.pages)
    }

    pub(crate) fn keep(&self, id: SequenceId) -> Result<Keep> {
        Ok(self.get(id)?.keep)
    }

    /// A sequence as it was saved: pages anew for the stretches that were kept.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where there are too few free pages; then nothing has changed.
    pub(crate) fn restore(
        &mut self,
        tokens: &[u32],
        kept: &[bool],
        keep: Keep,
    ) -> Result<SequenceId> {
        let wanted = kept.iter().filter(|&&kept| kept).count();
        if wanted > self.free.len() {
            return Err(Error::OutOfMemory(format!(
                "a saved sequence needs {wanted} pages, and {} are free",
                self.free.len()
            )));
        }
        let mut pages = Vec::with_capacity(kept.len());
        for &kept in kept {
            pages.push(match kept {
                true => {
                    let page = self.free.pop().expect("counted above");
                    self.holders[page as usize] = 1;
                    page
                }
                false => NO_PAGE,
            });
        }
        Ok(self.put(Sequence {
            pages,
            tokens: tokens.to_vec(),
            keep,
        }))
    }

    /// Pages that some sequence holds.
    pub(crate) fn used(&self) -> u32 {
        self.holders.len() as u32 - self.free.len() as u32
    }

    /// A sequence that begins with as many whole pages of `tokens` as others hold, but never all of them: the
    /// last token is always computed. One with a window shares none, as its pages go.
    pub(crate) fn start(&mut self, tokens: &[u32], keep: Keep) -> SequenceId {
        let mut pages = Vec::new();
        let most = match keep.window {
            None => tokens.len().saturating_sub(1) / self.page_len as usize,
            Some(_) => 0,
        };
        let mut parent = NO_PAGE;
        for stretch in tokens.chunks(self.page_len as usize).take(most) {
            match self.known.get(&(parent, stretch.into())) {
                Some(&page) => parent = page,
                None => break,
            }
            pages.push(parent);
            self.holders[parent as usize] += 1;
        }
        let shared = pages.len() * self.page_len as usize;
        self.put(Sequence {
            pages,
            tokens: tokens[..shared].to_vec(),
            keep,
        })
    }

    /// Adds tokens to a sequence. The answer is the pages to copy first, from and to: a page that others hold
    /// too is left to them.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where there are too few free pages; then nothing has changed but that pages which
    /// no query sees any more are given back.
    pub(crate) fn append(&mut self, id: SequenceId, tokens: &[u32]) -> Result<Option<[u32; 2]>> {
        let page_len = self.page_len as usize;
        self.get(id)?;
        self.give_back(id);
        let sequence = self.get(id)?;
        let len = sequence.tokens.len();
        let open = (!len.is_multiple_of(page_len)).then(|| sequence.pages[len / page_len]);
        let shared = open.filter(|&page| self.holders[page as usize] > 1 && !tokens.is_empty());
        let more = (len + tokens.len()).div_ceil(page_len) - sequence.pages.len();
        let wanted = more + usize::from(shared.is_some());
        if wanted > self.free.len() {
            return Err(Error::OutOfMemory(format!(
                "sequence {} needs {wanted} pages more, and {} are free",
                id.0,
                self.free.len()
            )));
        }
        let mut taken = Vec::with_capacity(wanted);
        for _ in 0..wanted {
            let page = self.free.pop().expect("counted above");
            self.holders[page as usize] = 1;
            taken.push(page);
        }
        let mut copy = None;
        if let Some(page) = shared {
            let own = taken.pop().expect("counted above");
            self.holders[page as usize] -= 1;
            copy = Some([page, own]);
        } else if let Some(page) = open.filter(|_| !tokens.is_empty()) {
            // What is cut off behind its tokens will be others.
            self.forget(page);
        }
        let sequence = self.sequences[id.0 as usize].as_mut().expect("it is there");
        if let Some([_, own]) = copy {
            sequence.pages[len / page_len] = own;
        }
        sequence.pages.extend(taken);
        sequence.tokens.extend_from_slice(tokens);
        self.learn(id, len / page_len);
        Ok(copy)
    }

    /// Makes a sequence's full pages from `first` on known to others.
    fn learn(&mut self, id: SequenceId, first: usize) {
        let page_len = self.page_len as usize;
        let sequence = self.sequences[id.0 as usize].as_ref().expect("it is there");
        if sequence.keep.window.is_some() {
            return;
        }
        for ix in first..sequence.tokens.len() / page_len {
            let parent = ix.checked_sub(1).map_or(NO_PAGE, |ix| sequence.pages[ix]);
            let key = (parent, sequence.tokens[ix * page_len..][..page_len].into());
            let page = sequence.pages[ix];
            if self.keys[page as usize].is_none() && !self.known.contains_key(&key) {
                self.known.insert(key.clone(), page);
                self.keys[page as usize] = Some(key);
            }
        }
    }

    fn forget(&mut self, page: u32) {
        if let Some(key) = self.keys[page as usize].take() {
            self.known.remove(&key);
        }
    }

    fn release(&mut self, page: u32) {
        if page == NO_PAGE {
            return;
        }
        let holders = &mut self.holders[page as usize];
        *holders -= 1;
        if *holders == 0 {
            self.forget(page);
            self.free.push(page);
        }
    }

    /// Gives back the pages that no later query of the sequence sees.
    fn give_back(&mut self, id: SequenceId) {
        let page_len = self.page_len;
        let sequence = self.sequences[id.0 as usize].as_mut().expect("it is there");
        let Some(window) = sequence.keep.window else {
            return;
        };
        let begin = unseen(sequence.tokens.len() as u32, window) / page_len;
        // A window of nothing ends behind the last position.
        let begin = begin.min(sequence.pages.len() as u32);
        let first = sequence.keep.first.div_ceil(page_len);
        let pages = first.min(begin) as usize..begin as usize;
        let gone: Vec<u32> = sequence.pages[pages]
            .iter_mut()
            .map(|page| std::mem::replace(page, NO_PAGE))
            .collect();
        gone.into_iter().for_each(|page| self.release(page));
    }

    /// Cuts a sequence back to `len` positions.
    ///
    /// # Errors
    /// [`Error::Refused`] for more than it has, and for positions whose window is no longer kept.
    pub(crate) fn truncate(&mut self, id: SequenceId, len: u32) -> Result<()> {
        let sequence = self.get(id)?;
        let now = sequence.tokens.len() as u32;
        if len > now {
            return Err(Error::refused(
                "len",
                len,
                format!("at most {now}, the sequence's length"),
            ));
        }
        let needed = sequence.keep.window.map_or(0, |window| unseen(len, window));
        let begin = (needed / self.page_len) as usize;
        let kept = len.div_ceil(self.page_len) as usize;
        let seen = &sequence.pages[begin.min(kept)..kept];
        if seen.contains(&NO_PAGE) {
            let bound = "positions whose window is still kept";
            return Err(Error::refused("len", len, bound));
        }
        let sequence = self.sequences[id.0 as usize].as_mut().expect("it is there");
        sequence.tokens.truncate(len as usize);
        let gone = sequence.pages.split_off(kept);
        gone.into_iter().for_each(|page| self.release(page));
        Ok(())
    }

    /// A sequence that goes on from all that another has; pages are copied when one of them writes.
    pub(crate) fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let sequence = self.get(id)?.clone();
        for &page in sequence.pages.iter().filter(|&&page| page != NO_PAGE) {
            self.holders[page as usize] += 1;
        }
        Ok(self.put(sequence))
    }

    pub(crate) fn remove(&mut self, id: SequenceId) -> Result<()> {
        self.get(id)?;
        let sequence = self.sequences[id.0 as usize].take().expect("it is there");
        sequence
            .pages
            .into_iter()
            .for_each(|page| self.release(page));
        Ok(())
    }
}

/// Rows of pages by the first ones that they have in common, as members and how many those are, such that the fewest
/// pages are read where a group's common ones are read once.
pub(crate) fn groups(rows: &[&[u32]]) -> Vec<(Vec<usize>, usize)> {
    best(rows, (0..rows.len()).collect(), 0).1
}

/// The pages spared, and the groups, of members that have their first `known` pages in common.
fn best(rows: &[&[u32]], members: Vec<usize>, known: usize) -> (usize, Vec<(Vec<usize>, usize)>) {
    let [first, others @ ..] = members.as_slice() else {
        return (0, Vec::new());
    };
    if others.is_empty() {
        return (0, vec![(members, 0)]);
    }
    let shortest = members.iter().map(|&row| rows[row].len()).min();
    let in_common = |&at: &usize| others.iter().all(|&row| rows[row][at] == rows[*first][at]);
    let common = (known..shortest.unwrap_or(0))
        .take_while(in_common)
        .last()
        .map_or(known, |at| at + 1);
    let mut by_next: BTreeMap<Option<u32>, Vec<usize>> = BTreeMap::new();
    for &row in &members {
        by_next
            .entry(rows[row].get(common).copied())
            .or_default()
            .push(row);
    }
    let together = others.len() * common;
    let mut apart = (0, Vec::new());
    if by_next.len() == 1 {
        return (together, vec![(members, common)]);
    }
    for (next, part) in by_next {
        let (spared, groups) = match next {
            Some(_) => best(rows, part, common + 1),
            // They end here: nothing more to share.
            None => ((part.len() - 1) * common, vec![(part, common)]),
        };
        apart.0 += spared;
        apart.1.extend(groups);
    }
    match together >= apart.0 {
        true => (together, vec![(members, common)]),
        false => apart,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_of_nothing_keeps_the_first_pages_alone() {
        let mut book = Book::new(4, 1);
        let keep = Keep {
            window: Some(0),
            first: 1,
        };
        let id = book.start(&[], keep);
        for token in 0..6 {
            book.append(id, &[token]).unwrap();
        }
        book.append(id, &[]).unwrap();
        assert_eq!(book.len(id).unwrap(), 6);
        assert_eq!(book.used(), 1);
    }

    #[test]
    fn groups_spare_the_most_pages() {
        let rows: [&[u32]; 8] = [
            &[1, 2, 3, 4, 5],
            &[9, 8],
            &[1, 2, 3, 4, 6],
            &[1, 7],
            &[1, 2, 3, 4],
            &[],
            &[9, 8],
            &[],
        ];
        let mut got = groups(&rows);
        got.sort();
        // The three of four pages spare 8; with the one of one page, 3 of one.
        let want = [
            (vec![0, 2, 4], 4),
            (vec![1, 6], 2),
            (vec![3], 0),
            (vec![5, 7], 0),
        ];
        assert_eq!(got, want);
        assert_eq!(groups(&[]), []);
        assert_eq!(groups(&[&[][..], &[]]), [(vec![0, 1], 0)]);
        assert_eq!(groups(&[&[3][..], &[3]]), [(vec![0, 1], 1)]);
    }
}
