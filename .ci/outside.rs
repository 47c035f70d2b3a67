use tokenselect::*;

fn main() -> Result<()> {
    let heads = HeadShape { num_qo_heads: 2, num_kv_heads: 1, head_dim: 8 };
    let config = SelectConfig { heads, dtype: DType::F32, ..SelectConfig::default() };
    let device = Device::cpu();
    let mut cache = PagedKvCache::new(&device, &config, &CacheConfig::default())?;
    let mut select = TokenSelect::new(&device, config, Limits::default())?;
    let sequence = cache.create()?;
    let batch = cache.extend(&[(sequence, 1)])?;
    let (q, kv, mut out) = ([0.5; 16], [0.25; 8], [0.0; 16]);
    let (input, output) = (select.input(&batch, &q, &kv, &kv)?, select.output(&batch, &mut out, None)?);
    select.step(&mut cache, 0, &batch, input, output)?;
    assert_eq!(out, [0.25; 16]);
    println!("a step on {}; auto: {}", device.name(), Device::auto().name());
    Ok(())
}
