//! One token after the other: the most probable one, or one that is drawn.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha12Rng;
use sha2::{Digest, Sha256};

use super::scores::{best, forbid, penalize, softmax, warp};

/// What a caption is to be like.
#[derive(Clone, Copy, Debug)]
pub struct ChainRules {
    /// No end before so many tokens.
    pub min_length: usize,
    /// An end at so many.
    pub max_length: usize,
    /// Of tokens that are there already.
    pub repetition_penalty: f32,
    /// The token that ends a caption.
    pub end: u32,
}

/// From what tokens are drawn.
#[derive(Clone, Debug)]
pub struct Nucleus {
    /// The least probability that the tokens together have.
    pub top_p: f32,
    /// At most so many.
    pub top_k: Option<usize>,
    /// Below 1 makes probable tokens more probable.
    pub temperature: f32,
    /// Decides.
    pub random: Box<ChaCha12Rng>,
}

/// A caption that grows.
#[derive(Debug)]
pub struct Chain {
    rules: ChainRules,
    nucleus: Option<Nucleus>,
    ids: Vec<u32>,
}

impl Chain {
    /// Before the first token behind the prompt; the most probable ones are taken where there is no nucleus.
    pub fn new(prompt: &[u32], rules: ChainRules, nucleus: Option<Nucleus>) -> Self {
        Self {
            rules,
            nucleus,
            ids: prompt.to_vec(),
        }
    }

    /// The caption.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Goes on by one token, given the logits behind the caption; whether that was the last.
    pub fn advance(&mut self, logits: &[f32]) -> bool {
        let rules = &self.rules;
        let mut scores = logits.to_vec();
        penalize(&mut scores, &self.ids, rules.repetition_penalty);
        if self.ids.len() < rules.min_length {
            forbid(&mut scores, rules.end);
        }
        let id = match &mut self.nucleus {
            None => best(&scores),
            Some(nucleus) => nucleus.draw(&mut scores),
        } as u32;
        self.ids.push(id);
        id == rules.end || self.ids.len() >= rules.max_length
    }
}

impl Nucleus {
    fn draw(&mut self, scores: &mut [f32]) -> usize {
        warp(scores, self.temperature, self.top_k, self.top_p);
        let probabilities = softmax(scores);
        let total: f64 = probabilities.iter().map(|p| f64::from(*p)).sum();
        let mut left = self.random.random::<f64>() * total;
        for (place, probability) in probabilities.iter().enumerate() {
            left -= f64::from(*probability);
            if left < 0.0 {
                return place;
            }
        }
        best(&probabilities)
    }
}

/// The random numbers of a picture: the same for the same pixels, whatever is captioned before or beside it.
pub fn generator(seed: u64, size: (u32, u32), pixels: &[u8]) -> Box<ChaCha12Rng> {
    let mut key = Sha256::new();
    key.update(b"caption");
    key.update(seed.to_le_bytes());
    key.update(size.0.to_le_bytes());
    key.update(size.1.to_le_bytes());
    key.update(pixels);
    Box::new(ChaCha12Rng::from_seed(key.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let logits = [0.5_f32.ln(), 0.3_f32.ln(), 0.15_f32.ln(), 0.05_f32.ln()];
        let nucleus = |seed| Nucleus {
            top_p: 0.9,
            top_k: None,
            temperature: 1.0,
            random: generator(seed, (1, 1), &[]),
        };
        let draw = |seed| {
            let mut nucleus = nucleus(seed);
            (0..20_000)
                .map(|_| nucleus.draw(&mut logits.to_vec()))
                .collect::<Vec<_>>()
        };
        let drawn = draw(1);
        assert_eq!(drawn, draw(1));
        assert_ne!(drawn, draw(2));
        for (place, expected) in [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]
            .iter()
            .enumerate()
        {
            let count = drawn.iter().filter(|id| **id == place).count();
            // Five standard deviations of the mean are below 0.018.
            assert!((count as f64 / 20_000.0 - expected).abs() < 0.018);
        }
    }
}
