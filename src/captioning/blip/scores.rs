//! What is done with the scores of a next token before one is chosen: the logits processors of transformers, in f32
//! as there.

/// `ln softmax`
pub fn log_softmax(scores: &mut [f32]) {
    let most = maximum(scores);
    let sum: f64 = scores
        .iter()
        .map(|score| f64::from((score - most).exp()))
        .sum();
    let shift = most + sum.ln() as f32;
    for score in scores {
        *score -= shift;
    }
}

/// `softmax`; what is minus infinity has no part in it.
pub fn softmax(scores: &[f32]) -> Vec<f32> {
    let most = maximum(scores);
    let powers: Vec<f32> = scores.iter().map(|score| (score - most).exp()).collect();
    let sum: f64 = powers.iter().map(|power| f64::from(*power)).sum();
    powers.iter().map(|power| power / sum as f32).collect()
}

/// Makes tokens less probable that are there already.
pub fn penalize(scores: &mut [f32], seen: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = if *score < 0.0 {
                *score * penalty
            } else {
                *score / penalty
            };
        }
    }
}

/// Keeps a caption from ending here.
pub fn forbid(scores: &mut [f32], id: u32) {
    if let Some(score) = scores.get_mut(id as usize) {
        *score = f32::NEG_INFINITY;
    }
}

/// What nucleus sampling draws from: temperature, then the `top_k` best, then the fewest that have `top_p` together
/// (Holtzman et al. 2020, arXiv:1904.09751).
pub fn warp(scores: &mut [f32], temperature: f32, top_k: Option<usize>, top_p: f32) {
    for score in scores.iter_mut() {
        *score /= temperature;
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    if let Some(worst) = top_k.and_then(|count| order.get(count.max(1) - 1)) {
        let least = scores[*worst];
        cut(scores, |_, score| score < least);
    }
    if top_p < 1.0 {
        let probabilities = softmax(scores);
        // From the least probable on; the most probable always stays.
        let mut sum = 0.0_f64;
        for place in order[1..].iter().rev() {
            sum += f64::from(probabilities[*place]);
            if sum as f32 > (1.0 - f64::from(top_p)) as f32 {
                break;
            }
            scores[*place] = f32::NEG_INFINITY;
        }
    }
}

/// The place of the highest score; of equal ones, the first.
pub fn best(scores: &[f32]) -> usize {
    let mut best = 0;
    for (place, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = place;
        }
    }
    best
}

fn cut(scores: &mut [f32], out: impl Fn(usize, f32) -> bool) {
    for (place, score) in scores.iter_mut().enumerate() {
        if out(place, *score) {
            *score = f32::NEG_INFINITY;
        }
    }
}

fn maximum(scores: &[f32]) -> f32 {
    scores.iter().copied().fold(f32::MIN, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::captioning::blip::testing;

    #[test]
    fn distributions_equal_those_of_the_reference() {
        let goldens = testing::json();
        let goldens = &goldens["distributions"];
        let logits: Vec<Vec<f32>> = serde_json::from_value(goldens["logits"].clone()).unwrap();
        for case in goldens["cases"].as_array().unwrap() {
            let number = |key: &str| case[key].as_f64().unwrap() as f32;
            let top_k = case["top_k"].as_u64().map(|count| count as usize);
            let expected: Vec<Vec<f32>> =
                serde_json::from_value(case["probabilities"].clone()).unwrap();
            for (logits, expected) in logits.iter().zip(expected) {
                let mut scores = logits.clone();
                warp(&mut scores, number("temperature"), top_k, number("top_p"));
                for (found, expected) in softmax(&scores).into_iter().zip(expected) {
                    assert_eq!(found == 0.0, expected == 0.0, "another choice of tokens");
                    assert!((found - expected).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn scores_that_are_no_numbers_are_no_panic() {
        for scores in [
            vec![f32::NAN; 4],
            vec![f32::NEG_INFINITY; 4],
            vec![f32::INFINITY; 4],
        ] {
            let mut scores = scores;
            log_softmax(&mut scores);
            warp(&mut scores, 0.5, Some(9), 0.5);
            assert_eq!(best(&softmax(&scores)), 0);
        }
    }
}
