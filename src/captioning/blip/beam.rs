//! Beam search for one picture, with the scores, rules and order of transformers 4.54 (`GenerationMixin._beam_search`).

use super::scores::{forbid, log_softmax, penalize};
use super::settings::EarlyStopping;

/// Added to what must not be chosen.
const NEVER: f32 = -1e9;

/// What the search is to do.
#[derive(Clone, Copy, Debug)]
pub struct BeamRules {
    /// Captions that are followed at once.
    pub beams: usize,
    /// Exponent of the length that scores are divided by.
    pub length_penalty: f32,
    /// When to end.
    pub early_stopping: EarlyStopping,
    /// No end before so many tokens.
    pub min_length: usize,
    /// An end at so many.
    pub max_length: usize,
    /// Of tokens that are there already.
    pub repetition_penalty: f32,
    /// The token that ends a caption.
    pub end: u32,
}

/// A caption with what is known of it.
#[derive(Clone, Debug)]
struct Candidate {
    ids: Vec<u32>,
    score: f32,
    /// The running beam that it goes on from.
    parent: usize,
    /// It has ended; among the finished: it has really been put there.
    ended: bool,
}

/// The state of a search.
#[derive(Debug)]
pub struct BeamSearch {
    rules: BeamRules,
    prompt: usize,
    running: Vec<Candidate>,
    finished: Vec<Candidate>,
    /// Whether a running caption may still become better than a finished one.
    improvable: bool,
    done: bool,
}

impl BeamSearch {
    /// Before the first token behind the prompt.
    pub fn new(prompt: &[u32], rules: BeamRules) -> Self {
        let candidate = |score| Candidate {
            ids: prompt.to_vec(),
            score,
            parent: 0,
            ended: false,
        };
        // Only the first beam goes on from the prompt, so that beams differ.
        let scores = (0..rules.beams).map(|beam| if beam == 0 { 0.0 } else { NEVER });
        Self {
            rules,
            prompt: prompt.len(),
            running: scores.map(candidate).collect(),
            finished: vec![candidate(NEVER); rules.beams],
            improvable: true,
            done: false,
        }
    }

    /// Whether the result stands.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The running captions: the beam that each goes on from, and its newest token.
    pub fn running(&self) -> impl Iterator<Item = (usize, u32)> {
        let last = |beam: &Candidate| beam.ids.last().copied().unwrap_or_default();
        self.running
            .iter()
            .map(move |beam| (beam.parent, last(beam)))
    }

    /// The best caption, with its score.
    pub fn best(&self) -> (&[u32], f32) {
        let best = &self.finished[0];
        (&best.ids, best.score)
    }

    /// Goes on by one token, given the logits behind each running caption.
    pub fn advance(&mut self, logits: &[&[f32]]) {
        let length = self.running[0].ids.len() + 1;
        let candidates = self.candidates(logits, length);
        let running = candidates.iter().map(|candidate| {
            let penalty = if candidate.ended { NEVER } else { 0.0 };
            candidate.score + penalty
        });
        self.running = best_of(running, self.rules.beams)
            .into_iter()
            .map(|(place, score)| Candidate {
                score,
                ..candidates[place].clone()
            })
            .collect();
        let all_ended = candidates.iter().all(|candidate| candidate.ended);
        self.finish(candidates, length);
        self.improvable &= self.may_improve(length);
        let full = self.is_full() && self.rules.early_stopping == EarlyStopping::WhenFull;
        self.done = !self.improvable || full || all_ended;
    }

    /// Twice as many continuations as beams, the best first: every beam may end in one of them.
    fn candidates(&self, logits: &[&[f32]], length: usize) -> Vec<Candidate> {
        let rules = &self.rules;
        let mut scores = Vec::with_capacity(logits.iter().map(|row| row.len()).sum());
        for (beam, logits) in self.running.iter().zip(logits) {
            let mut row = logits.to_vec();
            log_softmax(&mut row);
            penalize(&mut row, &beam.ids, rules.repetition_penalty);
            if length <= rules.min_length {
                forbid(&mut row, rules.end);
            }
            scores.extend(row.iter().map(|score| score + beam.score));
        }
        let vocabulary = logits.first().map_or(1, |row| row.len().max(1));
        let best = best_of(scores.into_iter(), 2 * rules.beams).into_iter();
        best.map(|(place, score)| {
            let (parent, id) = (place / vocabulary, (place % vocabulary) as u32);
            let mut ids = self.running[parent].ids.clone();
            ids.push(id);
            Candidate {
                ids,
                score,
                parent,
                ended: id == rules.end || length >= rules.max_length,
            }
        })
        .collect()
    }

    /// Puts what has ended among the finished captions, if it is better; only the best continuations count.
    fn finish(&mut self, candidates: Vec<Candidate>, length: usize) {
        let closed = self.is_full() && self.rules.early_stopping == EarlyStopping::WhenFull;
        let beams = self.rules.beams;
        let new = candidates.into_iter().enumerate().map(|(rank, candidate)| {
            let ended = candidate.ended && rank < beams;
            let mut score = candidate.score / self.divisor(length - self.prompt);
            for never in [closed, !self.improvable, !ended] {
                score += if never { NEVER } else { 0.0 };
            }
            Candidate {
                score,
                ended,
                ..candidate
            }
        });
        let all: Vec<Candidate> = self.finished.iter().cloned().chain(new).collect();
        let best = best_of(all.iter().map(|candidate| candidate.score), beams);
        self.finished = best
            .into_iter()
            .map(|(place, _)| all[place].clone())
            .collect();
    }

    fn may_improve(&self, length: usize) -> bool {
        let rules = &self.rules;
        let never = rules.early_stopping == EarlyStopping::Never;
        let longest = if never && rules.length_penalty > 0.0 {
            rules.max_length
        } else {
            length
        };
        let possible = self.running[0].score / self.divisor(longest - self.prompt);
        let scores = self.finished.iter().map(|finished| finished.score);
        let worst = scores.fold(f32::INFINITY, f32::min);
        self.finished
            .iter()
            .any(|finished| possible > if finished.ended { worst } else { NEVER })
    }

    fn is_full(&self) -> bool {
        self.finished.iter().all(|finished| finished.ended)
    }

    fn divisor(&self, tokens: usize) -> f32 {
        (tokens as f64).powf(f64::from(self.rules.length_penalty)) as f32
    }
}

/// Places and values of the highest, in falling order; what is no number comes last.
fn best_of(values: impl Iterator<Item = f32>, count: usize) -> Vec<(usize, f32)> {
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(count + 1);
    for (place, value) in values.enumerate() {
        let value = if value.is_nan() {
            f32::NEG_INFINITY
        } else {
            value
        };
        if best.len() == count && best.last().is_some_and(|(_, least)| *least >= value) {
            continue;
        }
        let at = best.partition_point(|(_, other)| *other >= value);
        best.insert(at, (place, value));
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(beams: usize) -> BeamRules {
        BeamRules {
            beams,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::Heuristic,
            min_length: 0,
            max_length: 4,
            repetition_penalty: 1.0,
            end: 0,
        }
    }

    #[test]
    fn the_highest_come_first_and_of_equals_the_first() {
        let values = [1.0, f32::NAN, 3.0, 3.0, -1.0];
        let best = best_of(values.into_iter(), 3);
        assert_eq!(best, [(2, 3.0), (3, 3.0), (0, 1.0)]);
        assert_eq!(best_of(values.into_iter(), 9).len(), 5);
    }

    #[test]
    fn a_second_best_token_may_begin_the_best_caption() {
        // Behind 1 all is equally probable, behind 2 the end is certain.
        let mut search = BeamSearch::new(&[3], rules(2));
        search.advance(&[&[-9.0, 0.1, 0.0, -9.0][..]; 2]);
        assert_eq!(search.running().collect::<Vec<_>>(), [(0, 1), (0, 2)]);
        search.advance(&[&[0.0; 4][..], &[9.0, 0.0, 0.0, 0.0][..]]);
        while !search.is_done() {
            search.advance(&[&[0.0; 4][..]; 2]);
        }
        assert_eq!(search.best().0, [3, 2, 0]);
    }

    #[test]
    fn scores_that_are_no_numbers_end_at_the_longest_caption() {
        let mut search = BeamSearch::new(&[3], rules(3));
        for _ in 0..4 {
            if !search.is_done() {
                search.advance(&[&[f32::NAN; 4][..]; 3]);
            }
        }
        assert!(search.is_done());
    }
}
