from rethink_prune import data as d


def describe_dataset(o):
    return d.describe_dataset(**o.model_dump(exclude={"pad", "flip", "mean", "std", "workers"}))


def load_dataset(o, *, cache_dir, progress):
    return d.load_dataset(**o.model_dump(exclude={"pad", "flip", "workers"}), cache_dir=cache_dir, progress=progress)


def train_batches(ds, o, *, batch_size, augment, device, seed):
    if isinstance(ds.train, d.Files):
        return d.StreamBatches(
            ds.train,
            mean=ds.mean,
            std=ds.std,
            image_size=o.image_size or 224,
            batch_size=batch_size,
            augment=augment,
            flip=o.flip and augment,
            device=device,
            seed=seed,
            workers=o.workers,
        )
    return d.TrainBatches(
        ds.train,
        mean=ds.mean,
        std=ds.std,
        batch_size=batch_size,
        pad=o.pad if augment else 0,
        flip=o.flip and augment,
        device=device,
        seed=seed,
    )


def eval_batches(ds, images, *, batch_size, device, workers):
    return d.eval_batches(
        images, mean=ds.mean, std=ds.std, image_size=224, batch_size=batch_size, device=device, workers=workers
    )
