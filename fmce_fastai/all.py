"Everything a notebook user needs: `from fmce_fastai.all import *`."
from fmce_fastai.callback import FMCECallback
from fmce_fastai.cam import CamComparison, CamError, cam_plan, cam_statistics, compare_cams, fine_tune_alphas, grad_cam
from fmce_fastai.convergence import Convergence, ConvergenceError, ConvergenceWarning, OnlineCQI, convergence
from fmce_fastai.data import (DataError, array_dls, cifar10_dls, cifar100_dls, data_sets, digits_dls, fashion_mnist_dls,
                              folder_dls, get_dls, mnist_dls)
from fmce_fastai.fit_oracle import fit_oracle, judge_oracle, plot_calibration, score_dataset
from fmce_fastai.hub import HubError
from fmce_fastai.interpret import fmce_report, fmcs_over_training, plot_fmcs
from fmce_fastai.losses import fmcs_loss, representation_auxiliary_loss
from fmce_fastai.oracle import FittedFMCENet, FMCENet, OracleError, OracleFileError, Scores, UniversalFMCENet
from fmce_fastai.recorder import DatasetError, FMCSDataset, FMCSRecorder, snapshot_steps
from fmce_fastai.study import Study, StudyError, run_study
from fmce_fastai.taps import FeatureTap, Tap, TapError, TapPlan, check_taps, hook_count, image_size_kwargs, tap_plan, timm_head

__all__ = [name for name in dir() if not name.startswith("_")]
