//! Choice of the next byte.

use tokenselect_examples::random::Random;

/// Draws bytes from predictions.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f64,
    random: Random,
}

impl Sampler {
    /// Temperature 0 always takes the most probable byte; 1 draws from the prediction as it is.
    pub fn new(temperature: f64, seed: u64) -> Self {
        Sampler { temperature, random: Random::new(seed) }
    }

    /// A byte from `logits`, `[vocab_size]`, of which the first 256 are bytes.
    pub fn draw(&mut self, logits: &[f32]) -> u8 {
        let bytes = || (0..=u8::MAX).zip(logits.iter().map(|&logit| f64::from(logit)));
        let mut best = (0, f64::NEG_INFINITY);
        for (byte, logit) in bytes() {
            if logit > best.1 {
                best = (byte, logit);
            }
        }
        if self.temperature == 0.0 {
            return best.0;
        }
        let (temperature, uniform) = (self.temperature, self.random.uniform());
        let weights = || bytes().map(|(byte, logit)| (byte, ((logit - best.1) / temperature).exp()));
        let sum: f64 = weights().map(|(_, weight)| weight).sum();
        let mut rest = uniform * sum;
        for (byte, weight) in weights() {
            rest -= weight;
            if rest < 0.0 {
                return byte;
            }
        }
        best.0
    }
}
