"RAL and recording inside fastai's training loop."
