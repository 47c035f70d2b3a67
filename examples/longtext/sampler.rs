//! Choice of the next token.

use tokenselect_examples::random::Random;

/// Draws tokens from predictions.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f64,
    random: Random,
}

impl Sampler {
    /// Temperature 0 always takes the most probable token; 1 draws from the prediction as it is.
    pub fn new(temperature: f64, seed: u64) -> Self {
        Sampler { temperature, random: Random::new(seed) }
    }

    /// A token from `logits`, `[vocab_size]`.
    pub fn draw(&mut self, logits: &[f32]) -> u32 {
        let tokens = || (0..).zip(logits.iter().map(|&logit| f64::from(logit)));
        let mut best = (0, f64::NEG_INFINITY);
        for (token, logit) in tokens() {
            if logit > best.1 {
                best = (token, logit);
            }
        }
        if self.temperature == 0.0 {
            return best.0;
        }
        let (temperature, uniform) = (self.temperature, self.random.uniform());
        let weights = || tokens().map(|(token, logit)| (token, ((logit - best.1) / temperature).exp()));
        let sum: f64 = weights().map(|(_, weight)| weight).sum();
        let mut rest = uniform * sum;
        for (token, weight) in weights() {
            rest -= weight;
            if rest < 0.0 {
                return token;
            }
        }
        best.0
    }
}
