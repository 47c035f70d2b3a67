//! Choice of the next byte.

/// Draws bytes from predictions.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f64,
    state: u64,
}

impl Sampler {
    /// Temperature 0 always takes the most probable byte; 1 draws from the prediction as it is.
    pub fn new(temperature: f64, seed: u64) -> Self {
        Sampler { temperature, state: seed }
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
        let (temperature, uniform) = (self.temperature, self.uniform());
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

    /// A number from 0 to below 1, by SplitMix64.
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}
