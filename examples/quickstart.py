"""Minimal example: an ordinary Lightning training with one more callback."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from sparse_lightning import SparsityCallback


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        self.head = nn.Linear(512, 10)  # stays dense: `head` is excluded by default

    def training_step(self, batch):
        return F.cross_entropy(self.head(self.hidden(batch[0])), batch[1])

    def validation_step(self, batch):
        correct = self.head(self.hidden(batch[0])).argmax(1) == batch[1]
        self.log("accuracy", correct.float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


L.seed_everything(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.from_numpy(images).float() / 16, torch.from_numpy(labels))
train, held_out = random_split(digits, [0.8, 0.2])
sparsity = SparsityCallback(density=0.25, block_size=16, update={"every_n_steps": 10})
trainer = L.Trainer(max_epochs=10, callbacks=[sparsity], logger=False)
model = Classifier()
trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(held_out, 512))
print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}, density {model.hidden[2].density:.2f}")
