"Real images as fastai DataLoaders."
